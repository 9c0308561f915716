"""The device copier for CUDA and ROCm GPUs (torch calls both ``cuda``).

Loads and stores have a stream each.  A store waits *on the device* for the fence that the forward thread
recorded, so it never reads a block before the step that writes it has ended (law L3), and no host thread of
the engine ever waits.  Only the transfer thread that called waits, for its own copies alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from umbp_core.errors import StateError, TransferError
from umbp_vllm.copy_plan import Numbers, PageArena, checked_batch, reject_repeats
from umbp_vllm.geometry import KvGeometry
from umbp_vllm.pinning import MAX_SLICE_BYTES, ArenaPinner
from umbp_vllm.staging import StagedCopies

STAGING_BYTES = 64 << 20
"""Device memory per direction; larger batches go in parts."""

_Copies = Callable[[int, Numbers, Numbers, torch.Tensor, torch.Tensor], None]


class CudaHost:
    """The driver's calls that make host memory known to the GPU."""

    def register(self, address: int, nbytes: int) -> int:
        """``cudaHostRegister``; the GIL is free meanwhile."""
        return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0).value)

    def unregister(self, address: int) -> int:
        """``cudaHostUnregister``."""
        return int(torch.cuda.cudart().cudaHostUnregister(address).value)


class _Lane:
    """One direction: its stream, its staging rows, and the lock under which a batch is issued.

    The lock covers issuing only.  Batches of several threads queue up on the stream, which alone orders their
    use of the staging rows.
    """

    def __init__(self, device: torch.device, rows: int, row_bytes: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device=device)
        self._lock = threading.Lock()
        with torch.cuda.stream(self._stream):
            self._staging = torch.zeros((rows, row_bytes), dtype=torch.uint8, device=device)

    def run(self, copies: _Copies, group: int, blocks: Numbers, pages: Numbers, fence: object) -> None:
        """Issue one batch after ``fence`` and wait until it has ended on the device."""
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.device(self._device):
            try:
                with self._lock, torch.cuda.stream(self._stream), torch.inference_mode():
                    index = torch.from_numpy(blocks).to(self._device)
                    if isinstance(fence, torch.cuda.Event):
                        self._stream.wait_event(fence)
                    copies(group, blocks, pages, index, self._staging)
                    done.record(self._stream)
                done.synchronize()
            except RuntimeError as error:
                self._settle()
                raise TransferError(
                    f"copying {blocks.size} blocks of KV group {group} failed on the GPU: {error}"
                ) from error

    def _settle(self) -> None:
        """Wait out what was issued before an error: its pages and blocks may be reused once we return."""
        try:
            self._stream.synchronize()
        except RuntimeError:
            return

    def drain(self) -> None:
        """Wait until nothing of this lane is under way."""
        with self._lock:
            self._settle()


class CudaCopier:
    """``DeviceCopier`` for a KV cache on a GPU; ``open`` before use, ``close`` before the arena is unmapped.

    ``staging_bytes`` bounds the device memory per direction (at least one page each); ``pin_slice_bytes`` is the
    unit in which the arena is locked, at most 16 GiB.  ``gather`` and ``scatter`` are for transfer threads, also
    several at once; ``fence`` is for the forward thread.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        arena: PageArena,
        *,
        staging_bytes: int = STAGING_BYTES,
        pin_slice_bytes: int = 1 << 30,
    ) -> None:
        self._geometry = geometry
        self._arena = arena
        self._staging_bytes = staging_bytes
        self._pin_slice_bytes = min(pin_slice_bytes, MAX_SLICE_BYTES)
        self._lanes: tuple[_Lane, _Lane] | None = None
        self._copies: StagedCopies | None = None
        self._pinner: ArenaPinner | None = None

    def open(self) -> None:
        """Take streams and staging memory, and start locking the arena in the background."""
        array = self._arena.array
        page_bytes = array.shape[1]
        slice_pages = max(1, self._pin_slice_bytes // page_bytes)
        rows = max(1, self._staging_bytes // page_bytes)
        device = self._geometry.device
        self._copies = StagedCopies(self._geometry, torch.from_numpy(array), slice_pages)
        self._lanes = (_Lane(device, rows, page_bytes), _Lane(device, rows, page_bytes))
        self._pinner = ArenaPinner(CudaHost(), self._arena.address, array.nbytes, slice_pages * page_bytes)
        self._pinner.start()

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
    def pinned_bytes(self) -> int:
        """Bytes of the arena that are locked already."""
        return self._pinner.pinned_bytes if self._pinner is not None else 0

    def fence(self) -> object:
        """An event behind everything that is on the forward thread's current stream now."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._geometry.device))
        return event

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

    def _opened(self) -> tuple[StagedCopies, tuple[_Lane, _Lane]]:
        copies, lanes = self._copies, self._lanes
        if copies is None or lanes is None:
            raise StateError("this copier is not open: call open() before the first copy and none after close()")
        return copies, lanes
