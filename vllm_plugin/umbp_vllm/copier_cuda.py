"""The device copier for CUDA and ROCm GPUs (torch calls both ``cuda``).

Loads and stores have a stream each.  A store waits *on the device* for the fence that the forward thread
recorded, so it never reads a block before the step that writes it has ended (law L3), and no thread of the engine
ever waits.  Only the transfer thread that called waits, for its own copies alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from umbp_core.errors import ConfigError, StateError, TransferError
from umbp_vllm.copy_plan import Numbers, PageArena, checked_batch, reject_repeats
from umbp_vllm.device_runtime import DeviceRuntime, TorchCuda
from umbp_vllm.geometry import KvGeometry
from umbp_vllm.pinning import MAX_SLICE_BYTES, ArenaPinner
from umbp_vllm.staging import StagedCopies

STAGING_BYTES = 64 << 20
"""Device memory for both directions together; larger batches go in parts."""
PIN_SLICE_BYTES = 256 << 20
"""Host memory locked at a time: the driver holds up other calls of the process for some 50 ms meanwhile."""

_Copies = Callable[[int, Numbers, Numbers, torch.Tensor, torch.Tensor], None]


class _Lane:
    """One direction: its stream, its staging rows, and the lock under which a batch is issued.

    The lock covers issuing only.  Batches of several threads queue up on the stream, which alone orders their
    use of the staging rows.
    """

    def __init__(self, runtime: DeviceRuntime, device: torch.device, rows: int, row_bytes: int) -> None:
        self._runtime = runtime
        self._device = device
        self._stream = runtime.new_stream()
        self._lock = threading.Lock()
        with runtime.on(self._stream):
            self._staging = torch.zeros((rows, row_bytes), dtype=torch.uint8, device=device)

    def run(self, copies: _Copies, group: int, blocks: Numbers, pages: Numbers, fence: object) -> None:
        """Issue one batch after ``fence`` and wait until it has ended on the device."""
        runtime, stream = self._runtime, self._stream
        try:
            with self._lock, runtime.on(stream):
                index = runtime.upload(torch.from_numpy(blocks))
                if fence is not None:
                    runtime.order_after(stream, fence)
                copies(group, blocks, pages, index, self._staging)
                done = runtime.mark(stream)
            runtime.wait(done)
        except RuntimeError as error:
            self.drain()
            raise TransferError(
                f"copying {blocks.size} blocks of KV group {group} failed on the GPU: {error}"
            ) from error

    def drain(self) -> None:
        """Wait until nothing of this lane is under way: what its copies touch may be reused afterwards.

        A device that reports an error here has stopped, which is as good.
        """
        with self._lock:
            try:
                self._runtime.drain(self._stream)
            except RuntimeError:
                return


class CudaCopier:
    """``DeviceCopier`` for a KV cache on a GPU; ``open`` before use, ``close`` before the arena is unmapped.

    ``staging_bytes`` bounds the device memory (at least one page per direction); ``pin_slice_bytes`` is the unit in
    which the arena is locked, at most 16 GiB, with what lies between its pages: pages of other ranks, which each of
    them locks for its own device.  ``gather`` and ``scatter`` are for transfer threads, also several
    at once; ``fence`` is for the forward thread.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        arena: PageArena,
        *,
        staging_bytes: int = STAGING_BYTES,
        pin_slice_bytes: int = PIN_SLICE_BYTES,
        runtime: DeviceRuntime | None = None,
    ) -> None:
        self._geometry = geometry
        self._arena = arena
        self._staging_bytes = staging_bytes
        self._pin_slice_bytes = min(pin_slice_bytes, MAX_SLICE_BYTES)
        self._runtime = runtime or TorchCuda(geometry.device)
        self._lanes: tuple[_Lane, _Lane] | None = None
        self._copies: StagedCopies | None = None
        self._pinner: ArenaPinner | None = None

    def open(self) -> None:
        """Take streams and staging memory.

        Locking the arena begins with the first copy, in the background, and not here: an engine captures its
        graphs between the two, and a driver call from another thread would spoil a capture.  Does nothing when
        already open.  Raises ``ConfigError`` when the GPU has no room for the staging memory.
        """
        if self._lanes is not None:
            return
        array = self._arena.array
        page_bytes = array.shape[1]
        apart = array.strides[0]  # more than a page where those of other ranks lie between (the host's daemon)
        slice_pages = max(1, self._pin_slice_bytes // apart)
        span = (array.shape[0] - 1) * apart + page_bytes
        rows = max(1, self._staging_bytes // 2 // page_bytes)
        try:
            loads, stores = (_Lane(self._runtime, self._geometry.device, rows, page_bytes) for _ in range(2))
        except RuntimeError as error:
            raise ConfigError(
                f"the GPU refuses {2 * rows * page_bytes} bytes of staging memory for umbp: {error}; lower "
                "--gpu-memory-utilization"
            ) from error
        self._lanes = loads, stores
        together = slice_pages if apart == page_bytes else 1
        self._copies = StagedCopies(self._geometry, torch.from_numpy(array), together)
        self._pinner = ArenaPinner(self._runtime, self._arena.address, span, slice_pages * apart)

    def close(self) -> None:
        """Wait for the copies under way, unlock the arena and free the staging memory.  Idempotent."""
        lanes, self._lanes = self._lanes, None
        for lane in lanes or ():
            lane.drain()
        pinner, self._pinner = self._pinner, None
        if pinner is not None:
            pinner.close()
        self._copies = None

    @property
    def on_host(self) -> bool:
        """False: the GPU copies, and one thread that waits is enough."""
        return False

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the arena that are locked already."""
        return self._pinner.pinned_bytes if self._pinner is not None else 0

    def fence(self) -> object:
        """An event behind everything that is on the forward thread's current stream now."""
        return self._runtime.mark_current()

    def gather(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy ``blocks`` of KV ``group`` into arena ``pages`` after ``fence``.  Raises ``TransferError``."""
        copies, (_, stores) = self._opened()
        block_array, page_array = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        reject_repeats("arena page", page_array)
        stores.run(copies.gather, group, block_array, page_array, fence)

    def scatter(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy arena ``pages`` into ``blocks`` of KV ``group`` after ``fence``.  Raises ``TransferError``."""
        copies, (loads, _) = self._opened()
        block_array, page_array = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        reject_repeats("block", block_array)
        loads.run(copies.scatter, group, block_array, page_array, fence)

    def bands(self, group: int) -> int:
        """How many bands of layers KV ``group`` has."""
        return self._opened()[0].bands(group)

    def band_layers(self, group: int, band: int) -> Sequence[str]:
        """The layers of a band."""
        return self._opened()[0].band_layers(group, band)

    def gather_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy one band of ``blocks`` of ``group`` into arena ``pages`` after ``fence``.  Raises ``TransferError``."""
        copies, (_, stores) = self._opened()
        block_array, page_array = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        reject_repeats("arena page", page_array)

        def gather(group: int, blocks: Numbers, pages: Numbers, index: torch.Tensor, staging: torch.Tensor) -> None:
            copies.gather_band(group, band, blocks, pages, index, staging)

        stores.run(gather, group, block_array, page_array, fence)

    def scatter_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy one band of arena ``pages`` into ``blocks`` of ``group`` after ``fence``.  Raises ``TransferError``."""
        copies, (loads, _) = self._opened()
        block_array, page_array = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        reject_repeats("block", block_array)

        def scatter(group: int, blocks: Numbers, pages: Numbers, index: torch.Tensor, staging: torch.Tensor) -> None:
            copies.scatter_band(group, band, blocks, pages, index, staging)

        loads.run(scatter, group, block_array, page_array, fence)

    def _opened(self) -> tuple[StagedCopies, tuple[_Lane, _Lane]]:
        copies, lanes, pinner = self._copies, self._lanes, self._pinner
        if copies is None or lanes is None or pinner is None:
            raise StateError("this copier is not open: call open() before the first copy and none after close()")
        pinner.start()
        return copies, lanes
