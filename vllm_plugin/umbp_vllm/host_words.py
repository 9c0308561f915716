"""What the leader and the thread that talks to the daemon say to each other, and what that thread needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from umbp_connectors.daemon.messages import TierFill
from umbp_connectors.daemon.pages import DaemonArena, Found, NewObject, Place
from umbp_connectors.pool.outcomes import PutStatus
from umbp_core.master.model import TierCapacity


class Pages(Protocol):
    """What is used of :class:`~umbp_connectors.daemon.pages.PageClient`; one thread at a time."""

    def connect(self, deadline: float) -> DaemonArena:
        """Attach to the daemon."""
        ...

    def take_pages(self, count: int, deadline: float) -> list[int]:
        """Pages without keys."""
        ...

    def publish(self, objects: Sequence[NewObject], deadline: float) -> list[PutStatus]:
        """Make what was written readable."""
        ...

    def look_up(self, keys: Sequence[bytes], prefix: bool, deadline: float) -> Found:
        """What is there."""
        ...

    def borrow(self, keys: Sequence[bytes], deadline: float) -> tuple[int, list[Place]]:
        """The number of a loan, and where the objects are."""
        ...

    def give_back(self, number: int, deadline: float) -> None:
        """End a loan."""
        ...

    def doubt(self, keys: Sequence[bytes], deadline: float) -> None:
        """Have the daemon verify objects."""
        ...

    def clear(self, deadline: float) -> int:
        """Forget every object."""
        ...

    def fills(self, deadline: float) -> Sequence[TierFill]:
        """How full the tiers are."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


class LookUp(msgspec.Struct, frozen=True):
    """Which of each run of keys are there?  The answer has the same ``number``.  ``prefix``: up to the first gap."""

    number: int
    runs: tuple[tuple[Sequence[bytes], bool], ...]
    until: float
    """When nobody is interested any more."""


class Borrow(msgspec.Struct, frozen=True):
    """Lend these."""

    number: int
    keys: Sequence[bytes]
    until: float


class GiveBack(msgspec.Struct, frozen=True):
    """A loan is over."""

    life: int
    loans: tuple[int, ...]


class Take(msgspec.Struct, frozen=True):
    """Grant so many pages."""

    count: int


class PublishAll(msgspec.Struct, frozen=True):
    """These are written."""

    life: int
    objects: Sequence[NewObject]


class Doubt(msgspec.Struct, frozen=True):
    """These did not verify."""

    keys: Sequence[bytes]


class Clear(msgspec.Struct, frozen=True):
    """Forget everything.  Is tried until a daemon has done it; nothing else is said before."""


class Visit(msgspec.Struct, frozen=True):
    """See whether the daemon is there still; if not, the next one is attached to.  There is no answer."""


class Measure(msgspec.Struct, frozen=True):
    """How full are the tiers?  ``done`` is told, in the thread that talks; of none when there is no daemon."""

    done: Callable[[Sequence[TierCapacity]], None]


class Stop(msgspec.Struct, frozen=True):
    """The last order."""


Order = LookUp | Borrow | GiveBack | Take | PublishAll | Doubt | Clear | Visit | Measure | Stop


class Attached(msgspec.Struct, frozen=True):
    """There is a daemon.  ``life`` grows when what was taken and lent before is void.

    Otherwise ``arena.taken`` are the pages that were not lost with the last connection.
    """

    life: int
    arena: DaemonArena


class Gone(msgspec.Struct, frozen=True):
    """The daemon does not answer."""

    reason: str


class There(msgspec.Struct, frozen=True):
    """The answer to :class:`LookUp`: the keys that are there; ``asked`` is false when nobody could be asked."""

    number: int
    keys: frozenset[bytes]
    asked: bool


class Lent(msgspec.Struct, frozen=True):
    """The answer to :class:`Borrow`: what can be read until ``until``, in the order of the keys."""

    number: int
    life: int
    loans: tuple[int, ...]
    places: list[tuple[bytes, Place]]
    until: float


class Taken(msgspec.Struct, frozen=True):
    """The answer to :class:`Take`."""

    life: int
    pages: list[int]


class Published(msgspec.Struct, frozen=True):
    """The answer to :class:`PublishAll`; ``None`` where nobody knows whose the page is now."""

    life: int
    objects: Sequence[NewObject]
    statuses: list[PutStatus | None]


class Cleared(msgspec.Struct, frozen=True):
    """The answer to :class:`Clear`."""


Answer = Attached | Gone | There | Lent | Taken | Published | Cleared
