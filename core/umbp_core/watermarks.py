"""Room that is kept free: a tier that gets fuller than its high watermark is emptied down to its low one.

Nothing here decides when: whoever has the directory calls :meth:`Trimmer.step` for a little at a time, between other
calls.  Who goes is decided as in every eviction.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from umbp_core.directory import Directory
from umbp_core.errors import ConfigError
from umbp_core.tiers import Tier

OBJECTS_PER_PAGE_LOOKED_AT = 16
"""How many objects a step looks at for each page that it may free: more than one, since some are held."""
_ROUNDING = 1e-9
"""So that 0.29 of 100 pages are 29."""


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Fractions of a tier's pages, at most 1.  With a ``high`` of 1 a tier may be full.

    Raises ``ConfigError`` when they are no fractions, or ``low`` is above ``high``.
    """

    high: float
    low: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise ConfigError(
                f"a high watermark of {self.high} and a low one of {self.low} do not go together; "
                "give fractions above 0 and up to 1, the low one not above the high one"
            )

    def level(self, total_pages: int) -> Level:
        """The same for a tier of so many pages, none of which is emptied yet."""
        return Level(int(self.high * total_pages + _ROUNDING), int(self.low * total_pages + _ROUNDING))


@dataclass(slots=True)
class Level:
    """When a tier is emptied, and how far, in used pages.  ``emptying`` lasts from above ``high`` down to ``low``."""

    high: int
    low: int
    emptying: bool = False

    def excess(self, used: int) -> int:
        """How many of ``used`` pages have to go now; 0 when there is nothing to do."""
        self.emptying = used > self.low if self.emptying else used > self.high
        return used - self.low if self.emptying else 0


@dataclass(slots=True)
class Trimmer:
    """Keeps room in those tiers of ``directory`` that ``marks`` names.  One thread at a time, as for the directory.

    What is ``waiting`` to be copied from DRAM to a slower tier stays in DRAM until that has happened or was given up.
    """

    directory: Directory
    marks: Mapping[Tier, Watermarks]
    waiting: Container[bytes] = ()
    trimmed: dict[Tier, int] = field(init=False)
    """Objects evicted so far, by tier."""
    _levels: dict[Tier, Level] = field(init=False)

    def __post_init__(self) -> None:
        self.trimmed = dict.fromkeys(self.marks, 0)
        stats = self.directory.stats
        self._levels = {tier: marks.level(stats(tier).total_pages) for tier, marks in self.marks.items()}

    @property
    def is_due(self) -> bool:
        """Whether a tier is fuller than it should be.  O(1)."""
        return any(self._excess(tier) for tier in self._levels)

    def step(self, pages: int) -> int:
        """Free up to about ``pages`` pages of each tier that is fuller than it should be; how many objects went.

        None although :attr:`is_due`: all that was looked at is held.  What was looked at counts as used, so that the
        next step looks further.
        """
        gone = 0
        for tier in self._levels:
            excess = min(self._excess(tier), pages)
            if excess:
                keep = self.waiting if tier is Tier.DRAM else ()
                went = self.directory.trim(tier, excess, OBJECTS_PER_PAGE_LOOKED_AT * pages, keep)
                self.trimmed[tier] += went
                gone += went
        return gone

    def _excess(self, tier: Tier) -> int:
        stats = self.directory.stats(tier)
        return self._levels[tier].excess(stats.total_pages - stats.free_pages)
