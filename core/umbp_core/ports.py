"""What the core and the pool need from outside, as Protocols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from umbp_core.tiers import Tier


class Clock(Protocol):
    """Monotonic seconds.  Any thread."""

    def __call__(self) -> float:
        """Seconds since an arbitrary moment, never going back."""
        ...


@runtime_checkable
class DeviceCopier(Protocol):
    """Moves bytes between the engine's KV blocks (HBM) and arena pages.

    ``gather`` and ``scatter`` are called from transfer threads, one call per batch and group, and must
    not hold the GIL while bytes move.  They return when the bytes are in place.
    """

    @property
    def on_host(self) -> bool:
        """Whether HBM is host memory here, and the calling thread's core moves the bytes: several share a load then."""
        ...

    def fence(self) -> object:
        """A mark on the device's current work.  Forward thread; at most a few microseconds, never waits."""
        ...

    def gather(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy HBM ``blocks`` of KV ``group`` into arena ``pages``, after everything before ``fence``.

        Raises ``TransferError`` when the copy failed; the pages then hold garbage.
        """
        ...

    def scatter(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy arena ``pages`` into HBM ``blocks`` of KV ``group``, after everything before ``fence``.

        Raises ``TransferError`` when the copy failed; the blocks then hold garbage.
        """
        ...


class LayerCopier(Protocol):
    """The part of a device copier that layer-wise loads need; threads and errors as in :class:`DeviceCopier`.

    The layers of a group are copied in *bands*: neighbouring layers that go together, numbered from 0 in the order in
    which a forward pass reads them.
    """

    def bands(self, group: int) -> int:
        """How many bands KV ``group`` has; at least 1."""
        ...

    def scatter_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy one band of arena ``pages`` into HBM ``blocks`` of KV ``group``, after everything before ``fence``.

        Raises ``TransferError`` when the copy failed; that band of the blocks then holds garbage.
        """
        ...


class PoolObserver(Protocol):
    """Told what happened; must neither raise nor block.  The thread of the caller."""

    def op_finished(self, direction: str, status: str, nbytes: int, seconds: float, reason: str) -> None:
        """An op ended on this rank."""
        ...

    def blocks_changed(self, added: Sequence[bytes], removed: Sequence[bytes], tier: Tier) -> None:
        """Blocks became, or stopped being, readable in ``tier``."""
        ...

    def degraded(self, what: str, reason: str) -> None:
        """Something of the pool is not used any more, and why."""
        ...
