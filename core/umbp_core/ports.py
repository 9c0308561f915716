"""What the core and the pool need from outside, as Protocols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from umbp_core.copies import TierStats
from umbp_core.master.model import ExternalMatch
from umbp_core.outcomes import DeploymentMode, GetStatus, PoolCounters, PoolStats, PutStatus
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
    """The part of a device copier that goes layer by layer; threads and errors as in :class:`DeviceCopier`.

    The layers of a group are copied in *bands*: neighbouring layers that go together, numbered from 0 in the order in
    which a forward pass reads them.
    """

    def bands(self, group: int) -> int:
        """How many bands KV ``group`` has; at least 1."""
        ...

    def band_layers(self, group: int, band: int) -> Sequence[str]:
        """The names of the layers in a band; none where this rank has no layer of the group."""
        ...

    def gather_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy one band of HBM ``blocks`` of KV ``group`` into its part of arena ``pages``, after ``fence``.

        Raises ``TransferError`` when the copy failed; that part of the pages then holds garbage.
        """
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


class DramTier(Protocol):
    """Pages of shared memory by number, open.  Views may be used by any thread."""

    page_bytes: int
    pages: int
    staging_pages: int

    @property
    def array(self) -> Any:
        """All pages as a numpy array of uint8, shape (pages + staging_pages, page_bytes), writable, no copy."""
        ...

    def page(self, index: int, nbytes: int | None = None) -> memoryview:
        """The first ``nbytes`` of page ``index`` (all of it by default), writable, no copy.

        Raises ``StateError`` when there is no such page or it is shorter.
        """
        ...

    def close(self) -> None:
        """Give the memory back; idempotent.  Views that are still held stay valid."""
        ...


class Slots(Protocol):
    """Slots by number, whatever holds them.  Any thread; the GIL is released while bytes move.

    A slot holds what was written to it last.  What a slot holds that was never written, and one whose write failed, is
    undefined, but not its length: reading it gives some bytes or an ``UmbpError``, never an error of another kind.
    """

    slot_bytes: int
    slots: int

    def read_into(self, slot: int, view: Any, /) -> None:
        """Fill the buffer ``view`` (C-contiguous, writable, at most a slot) from the start of ``slot``.

        Raises ``TransferError`` when the bytes cannot be had; ``view`` then holds garbage.  Raises ``StateError`` for a
        slot that does not exist, more bytes than a slot has, memory that is read-only, and a tier that is closed.
        """
        ...

    def write_from(self, slot: int, view: Any, /) -> None:
        """Write the buffer ``view`` (C-contiguous, at most a slot) to the start of ``slot``.

        Whoever reads the slot after this has returned gets these bytes, in this process and after its death.  Raises
        ``TierUnavailable`` when the tier takes no more bytes, ``TransferError`` when this write failed, ``StateError``
        as :meth:`read_into`.
        """
        ...

    def sync(self) -> None:
        """Return when everything written before survives the death of the machine.  Raises as :meth:`write_from`."""
        ...


@runtime_checkable
class SlotRuns(Slots, Protocol):
    """Slots of which neighbours can be read and written in one go."""

    def read_run(self, slot: int, views: Sequence[Any], /) -> None:
        """As :meth:`read_into` for each of ``views``, which are as long as a slot, from ``slot`` on.

        When it raises, each of these views holds anything.
        """
        ...

    def write_run(self, slot: int, views: Sequence[Any], /) -> None:
        """As :meth:`write_from` for each of ``views``, which are as long as a slot, from ``slot`` on.

        When it raises, each of these slots holds what it held, what was to be written, or garbage.
        """
        ...


class SsdTier(Protocol):
    """One rank's share of the tier below DRAM, open, and kept from a second owner."""

    @property
    def slab(self) -> Slots:
        """The slots."""
        ...

    @property
    def slots(self) -> int:
        """How many objects fit."""
        ...

    @property
    def is_new(self) -> bool:
        """True when nothing in it is of an earlier life; then nothing that a catalogue says of it is believed."""
        ...

    def close(self, timeout: float = 10.0) -> None:
        """Wait at most ``timeout`` seconds for transfers under way, then let everything go; idempotent."""
        ...


class PoolClient(Protocol):
    """A pool for batches of objects that are given as buffers, open: in this process, in a daemon, or elsewhere.

    Objects are named by block keys and belong to the identity that the client was made for.  A buffer is C-contiguous
    memory (``memoryview``, ``bytearray``, numpy array), an array whose last axis is contiguous, or a tuple of these;
    ``ObjectRows`` serve for a whole batch.  Answers come in the order of the keys.  Any thread.

    Every call raises ``StateError`` when the client is closed, and ``ValueError`` when the arguments do not match.
    """

    def put(
        self, keys: Sequence[bytes], buffers: Any, depths: Sequence[int] | None = None, timeout: float | None = None
    ) -> list[PutStatus]:
        """Store ``buffers[i]`` under ``keys[i]``; the first writer wins.  ``depths`` are places in prefix chains.

        What is not copied after ``timeout`` seconds is ``TIMED_OUT``.
        """
        ...

    def get(self, keys: Sequence[bytes], buffers: Any, timeout: float | None = None) -> list[GetStatus]:
        """Fill ``buffers[i]``, whose size must be the object's, with the object under ``keys[i]``.

        When the call returns, nobody writes to the buffers any more.
        """
        ...

    def exists(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        """Which of ``keys`` can be read now.  Never waits for a disk.

        Whoever has to ask another process for it gives up after ``timeout`` seconds; the rest is not there then.
        """
        ...

    def count_prefix(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        """How many of ``keys``, from the first on and without a gap, can be read now; ``timeout`` as for `exists`."""
        ...

    def clear(self) -> int:
        """Forget every object of this identity; returns how many copies could be read.

        Raises ``TierUnavailable`` when whoever keeps the pool does not answer: then they are still there.
        """
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until what was stored would be found after a restart, for at most ``timeout`` seconds; true when so."""
        ...

    def stats(self, tier: Tier) -> TierStats | None:
        """How full ``tier`` is; ``None`` when the pool has no such tier."""
        ...

    def counters(self) -> PoolCounters:
        """What happened so far."""
        ...

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...


class UMBPClient(Protocol):
    """The client of the pool, with the names and the meaning of UMBP's ``IUMBPClient``; any thread.

    Keys are bytes or text (its UTF-8).  A buffer is what :class:`PoolClient` takes, or a pair (address, size) of memory
    of this process, which has to stay where it is during the call; nothing is copied twice.  Of a key that is there,
    a put is ``PRESENT`` and changes nothing; a get whose buffer has not the object's size is ``SIZE_MISMATCH``.  Where
    UMBP says yes or no, a status says why; ``PutStatus.kept`` and ``GetStatus.hit`` are its yes.

    The calls about external KV tell and ask the master.  Without one they do nothing, as UMBP's do in a process alone:
    telling is true and asking finds nothing.
    """

    @property
    def deployment_mode(self) -> DeploymentMode:
        """Who owns the bytes."""
        ...

    @property
    def is_distributed(self) -> bool:
        """Whether objects of other nodes can be read."""
        ...

    def put(self, key: bytes | str, buffer: Any) -> PutStatus:
        """Store one object."""
        ...

    def get(self, key: bytes | str, buffer: Any) -> GetStatus:
        """Fill ``buffer`` with one object."""
        ...

    def exists(self, key: bytes | str) -> bool:
        """Whether an object can be read now."""
        ...

    def batch_put(self, keys: Sequence[bytes | str], buffers: Any) -> list[PutStatus]:
        """Store many objects."""
        ...

    def batch_put_with_depth(self, keys: Sequence[bytes | str], buffers: Any, depths: Sequence[int]) -> list[PutStatus]:
        """Store many objects; ``depths`` are their places in prefix chains, for eviction.  Empty or -1: not known."""
        ...

    def batch_get(self, keys: Sequence[bytes | str], buffers: Any) -> list[GetStatus]:
        """Fill many buffers."""
        ...

    def batch_exists(self, keys: Sequence[bytes | str]) -> list[bool]:
        """Which objects can be read now."""
        ...

    def batch_exists_consecutive(self, keys: Sequence[bytes | str]) -> int:
        """How many objects can be read now before the first that cannot: one call, which stops there."""
        ...

    def clear(self) -> bool:
        """Forget every object; true when that is done.  True also when closed: there is nothing then."""
        ...

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until what was put before would be found after a restart and the master knows what it was told.

        False when ``timeout`` seconds were not enough or a disk refused.
        """
        ...

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...

    def register_memory(self, address: int, size: int) -> bool:
        """Say that ``size`` bytes from ``address`` are going to be put from and got to; whether that helps the mode.

        Where this process copies by itself nothing needs to be registered, and any memory may be given to any call.
        """
        ...

    def deregister_memory(self, address: int) -> None:
        """Take back what was registered under ``address``, and nothing else; unknown addresses are no error."""
        ...

    def report_external_kv_blocks(self, hashes: Sequence[bytes | str], tier: Tier) -> bool:
        """Tell the master that this node holds blocks; true when it is on its way."""
        ...

    def revoke_external_kv_blocks(self, hashes: Sequence[bytes | str], tier: Tier) -> bool:
        """Tell the master that this node does not hold blocks any more."""
        ...

    def revoke_all_external_kv_blocks_at_tier(self, tier: Tier) -> bool:
        """Tell the master that this node holds nothing in ``tier`` any more."""
        ...

    def match_external_kv(self, hashes: Sequence[bytes | str], count_as_hit: bool = False) -> list[ExternalMatch]:
        """Who holds which of ``hashes``; empty when the master does not answer in time."""
        ...

    def get_external_kv_hit_counts(self, hashes: Sequence[bytes | str]) -> list[tuple[bytes, int]]:
        """How often each of ``hashes`` was matched as a hit, those that were."""
        ...

    def stats(self) -> PoolStats:
        """How full the tiers are, and what happened so far."""
        ...
