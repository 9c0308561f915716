"""Somebody who is told, and writes it down."""

from __future__ import annotations

from collections.abc import Sequence

Call = tuple[str, int, tuple[bytes, ...]]


class Notes:
    """Every call, in order, and what follows from them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.known: set[tuple[int, bytes]] = set()

    def report(self, hashes: Sequence[bytes], tier: int) -> None:
        self.calls.append(("report", tier, tuple(hashes)))
        self.known |= {(tier, key) for key in hashes}

    def revoke(self, hashes: Sequence[bytes], tier: int) -> None:
        self.calls.append(("revoke", tier, tuple(hashes)))
        self.known -= {(tier, key) for key in hashes}

    def clear(self, tier: int) -> None:
        self.calls.append(("clear", tier, ()))
        self.known = {entry for entry in self.known if entry[0] != tier}
