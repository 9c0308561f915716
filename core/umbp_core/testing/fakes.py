"""In-memory stand-ins for what the core and the pool get from outside.

Each takes a hook that is called before it acts: let it raise to inject a failure, or wait for an event to
inject a delay.  Nothing here knows a thread, so a hook must be safe for the threads that it is used from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from umbp_core.errors import TransferError
from umbp_core.tiers import Tier

Bytes = npt.NDArray[np.uint8]


class FakeClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """The current fake time in seconds."""
        return self.now

    def advance(self, seconds: float) -> float:
        """Let ``seconds`` pass; returns the new time."""
        self.now += seconds
        return self.now


class CopyCall(NamedTuple):
    """One call of a :class:`MemoryDevice`: ``kind`` is ``"gather"`` or ``"scatter"``; ``band`` of -1 means all."""

    kind: str
    group: int
    blocks: tuple[int, ...]
    pages: tuple[int, ...]
    fence: object
    band: int = -1


def _do_nothing(*_: object) -> None:
    """The default of every hook."""


class MemoryDevice:
    """A :class:`~umbp_core.ports.DeviceCopier` and ``LayerCopier`` whose HBM is a numpy array per KV group.

    ``pages`` is the arena: uint8 of shape (pages, page bytes).  ``hbm[g]`` is uint8 of shape (blocks, object
    bytes of group g).  Fences are the integers 1, 2, 3, ...; ``on_copy`` sees every :class:`CopyCall` before
    a byte moves, and ``calls`` keeps them.  ``on_host`` is what the device says about itself.  Every group has
    ``BANDS`` bands of layers, of equal size but for the last one.
    """

    BANDS = 4

    def __init__(
        self,
        pages: Bytes,
        object_bytes: Mapping[int, int],
        blocks: int,
        on_copy: Callable[[CopyCall], None] = _do_nothing,
        on_host: bool = False,
    ) -> None:
        self.pages = pages
        self.on_host = on_host
        self.hbm: dict[int, Bytes] = {g: np.zeros((blocks, n), dtype=np.uint8) for g, n in object_bytes.items()}
        self.on_copy = on_copy
        self.calls: list[CopyCall] = []
        self.fences = 0

    def fence(self) -> object:
        """The next fence."""
        self.fences += 1
        return self.fences

    def gather(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """HBM to pages."""
        hbm = self._begin("gather", group, blocks, pages, fence)
        for block, page in zip(blocks, pages, strict=True):
            self.pages[page, : hbm.shape[1]] = hbm[block]

    def scatter(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Pages to HBM."""
        hbm = self._begin("scatter", group, blocks, pages, fence)
        for block, page in zip(blocks, pages, strict=True):
            hbm[block] = self.pages[page, : hbm.shape[1]]

    def bands(self, group: int) -> int:
        """``BANDS``."""
        return self.BANDS

    def band_layers(self, group: int, band: int) -> Sequence[str]:
        """A single layer, which says where it belongs."""
        return (f"group {group} layer {band}",)

    def gather_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """One band of HBM to pages."""
        hbm = self._begin("gather", group, blocks, pages, fence, band)
        part = self.band_bytes(group, band)
        for block, page in zip(blocks, pages, strict=True):
            self.pages[page, part] = hbm[block, part]

    def scatter_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """One band of pages to HBM."""
        hbm = self._begin("scatter", group, blocks, pages, fence, band)
        part = self.band_bytes(group, band)
        for block, page in zip(blocks, pages, strict=True):
            hbm[block, part] = self.pages[page, part]

    def band_bytes(self, group: int, band: int) -> slice:
        """Which bytes of an object are a band's."""
        size = self.hbm[group].shape[1]
        each = -(-size // self.BANDS)
        return slice(band * each, min((band + 1) * each, size))

    def _begin(
        self, kind: str, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object, band: int = -1
    ) -> Bytes:
        call = CopyCall(kind, group, tuple(blocks), tuple(pages), fence, band)
        self.calls.append(call)
        self.on_copy(call)
        if group not in self.hbm:
            raise TransferError(f"KV group {group} is not on this device")
        return self.hbm[group]


class MemoryPages:
    """An arena in ordinary memory: ``array`` is uint8 of shape (pages, page bytes)."""

    def __init__(self, page_bytes: int, pages: int) -> None:
        self.array: Bytes = np.zeros((pages, page_bytes), dtype=np.uint8)

    def page(self, index: int, nbytes: int | None = None) -> memoryview:
        """The first ``nbytes`` of page ``index``, writable, no copy."""
        row = self.array[index]
        return memoryview(row if nbytes is None else row[:nbytes])


class MemorySlots:
    """A slab in ordinary memory: ``data`` maps a slot to the bytes that were written to it.

    ``on_io`` is called with ``"read"`` or ``"write"`` and the slot before a byte moves.
    """

    def __init__(self, on_io: Callable[[str, int], None] = _do_nothing) -> None:
        self.data: dict[int, bytes] = {}
        self.on_io = on_io

    def read_into(self, slot: int, buffer: memoryview, /) -> None:
        """Fill ``buffer`` from ``slot``; raises ``TransferError`` when less was ever written."""
        self.on_io("read", slot)
        stored = self.data.get(slot, b"")
        if len(stored) < len(buffer):
            raise TransferError(f"slot {slot} holds {len(stored)} bytes, {len(buffer)} are wanted")
        buffer[:] = stored[: len(buffer)]

    def write_from(self, slot: int, buffer: memoryview, /) -> None:
        """Keep a copy of ``buffer`` as ``slot``."""
        self.on_io("write", slot)
        self.data[slot] = bytes(buffer)


class FinishedOp(NamedTuple):
    """What a :class:`RecordingObserver` was told about one op."""

    direction: str
    status: str
    nbytes: int
    seconds: float
    reason: str


class RecordingObserver:
    """A :class:`~umbp_core.ports.PoolObserver` that keeps everything."""

    def __init__(self) -> None:
        self.ops: list[FinishedOp] = []
        self.changes: list[tuple[tuple[bytes, ...], tuple[bytes, ...], Tier]] = []
        self.degradations: list[tuple[str, str]] = []

    def op_finished(self, direction: str, status: str, nbytes: int, seconds: float, reason: str) -> None:
        """Keep it."""
        self.ops.append(FinishedOp(direction, status, nbytes, seconds, reason))

    def blocks_changed(self, added: Sequence[bytes], removed: Sequence[bytes], tier: Tier) -> None:
        """Keep it."""
        self.changes.append((tuple(added), tuple(removed), tier))

    def degraded(self, what: str, reason: str) -> None:
        """Keep it."""
        self.degradations.append((what, reason))
