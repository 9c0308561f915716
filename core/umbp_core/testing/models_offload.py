"""Plain models of the offload policies: they promise the same, with loops over everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class FrequencyModel:
    """Counts of blocks that were seen, lowered one by one."""

    min_sightings: int
    window_s: float
    capacity: int
    most: int
    counts: dict[bytes, int] = field(default_factory=dict)
    window: int | None = None

    def admit(self, keys: Sequence[bytes], now: float) -> list[bool]:
        """See each of ``keys``; whether it was seen often enough."""
        self.pass_time(now)
        return [self._see(key) >= 2 ** (self.min_sightings - 1) for key in keys]

    def pass_time(self, now: float) -> None:
        """Lower all counts once for each window that has ended."""
        window = int(now // self.window_s)
        for _ in range(0 if self.window is None else window - self.window):
            self._lower()
        self.window = window

    def _see(self, key: bytes) -> int:
        if key in self.counts:
            self.counts[key] = min(2 * self.counts[key], self.most)
        else:
            while len(self.counts) >= self.capacity:
                self._lower()
            self.counts[key] = 1
        return self.counts[key]

    def _lower(self) -> None:
        self.counts = {key: count - 1 for key, count in self.counts.items() if count > 1}


def longest_prefix(priorities: Sequence[int], least: int) -> int:
    """How many blocks of a chain go, from the first on: up to the first whose priority is below ``least``."""
    for index, priority in enumerate(priorities):
        if priority < least:
            return index
    return len(priorities)
