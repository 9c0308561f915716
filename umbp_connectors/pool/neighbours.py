"""What lies side by side in a slab, and moves in one go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def in_runs(items: Iterable[Item], slot_of: Callable[[Item], int | None], most: int = sys.maxsize) -> list[list[Item]]:
    """``items``, in their order, in runs of at most ``most`` whose slots follow each other.

    What is to move alone has ``None`` for a slot.
    """
    runs: list[list[Item]] = []
    following: int | None = None
    for item in items:
        slot = slot_of(item)
        if slot is not None and slot == following and len(runs[-1]) < most:
            runs[-1].append(item)
        else:
            runs.append([item])
        following = None if slot is None else slot + 1
    return runs
