"""The numbered messages that a worker gets, one per step of its leader: each is carried out once, and a gap is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

M = TypeVar("M")


class Intake(Generic[M]):
    """Takes messages with growing numbers.  One thread at a time.

    A message that was taken and not carried out, because the call that should have done so never came, is carried out
    when the next one arrives.  A number that does not grow is a replay, or comes after its gap was seen: it is ignored,
    so what was missed once never happens.
    """

    def __init__(self, number_of: Callable[[M], int]) -> None:
        """Messages are numbered from 1 on."""
        self._number_of = number_of
        self._last = 0
        self._waiting: list[M] = []
        self._missed: list[tuple[int, int]] = []

    def take(self, message: M) -> bool:
        """A message arrived; False when it is ignored."""
        number = self._number_of(message)
        if number <= self._last:
            return False
        if number > self._last + 1:
            self._missed.append((self._last + 1, number - 1))
        self._last = number
        self._waiting.append(message)
        return True

    def is_newest(self, message: M) -> bool:
        """Whether no later message was taken."""
        return self._number_of(message) == self._last

    def late(self) -> list[M]:
        """What was taken before the newest message and is still to be carried out: now, in order, before all else."""
        late, self._waiting = self._waiting[:-1], self._waiting[-1:]
        return late

    def due(self) -> list[M]:
        """What was taken and is to be carried out now, in order."""
        due, self._waiting = self._waiting, []
        return due

    def missed(self) -> list[tuple[int, int]]:
        """The gaps since the last call, each by its first and last number.  What they held never happens."""
        missed, self._missed = self._missed, []
        return missed
