"""The device copier for KV caches in host memory.

A batch is one list of (address, address, length) and moves in a few system calls: ``process_vm_readv`` on the
own process copies up to 1024 pieces per call.  Python lets go of the GIL once per call and not once per piece,
which matters because the engine's step loop holds the GIL and gives it back only every 5 ms.  It needs no alignment
and, unlike torch operators called from a transfer thread, starts no second OpenMP pool that would fight
the model's threads.  Speeds of the alternatives: ``benchmarks/copiers.py``.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np

from umbp_core.errors import TransferError
from umbp_vllm.copy_plan import Numbers, PageArena, PieceTable, checked_batch, reject_repeats
from umbp_vllm.geometry import KvGeometry

_log = logging.getLogger(__name__)

MAX_PIECES = 1024
"""IOV_MAX: pieces per system call."""
MAX_BYTES = 1 << 30
"""Bytes per system call; the kernel cuts silently at 2 GiB."""

_FORBIDDEN = (errno.EPERM, errno.ENOSYS, errno.EACCES)
"""What a container's system-call filter answers."""

VectorRead = Callable[[int, int, int, int, int, int], int]
"""``process_vm_readv(pid, local vectors, count, remote vectors, count, flags)``, with ``ctypes`` errno."""


def process_vm_readv() -> VectorRead | None:
    """The C library's function; ``None`` where it has none.  Calls through it let go of the GIL."""
    library = ctypes.CDLL(None, use_errno=True)
    try:
        function = library.process_vm_readv
    except AttributeError:
        return None
    function.restype = ctypes.c_ssize_t
    number, vector, count = ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong
    function.argtypes = (number, vector, count, vector, count, count)
    return cast("VectorRead", function)


class BatchMove:
    """Copies many pieces of this process's memory.  Any thread, also several at once.

    Where the system call is forbidden (a container's seccomp filter), pieces are copied one by one instead, and
    one warning says so.
    """

    def __init__(self, vector_read: VectorRead | None) -> None:
        self._vector_read = vector_read

    def __call__(self, destinations: Numbers, sources: Numbers, lengths: Numbers) -> None:
        """Copy ``lengths[i]`` bytes from ``sources[i]`` to ``destinations[i]`` for every ``i``.

        The addresses must be valid and the pieces must not overlap.  Raises ``TransferError``.
        """
        for first, last in system_calls(lengths):
            part = slice(first, last)
            function = self._vector_read
            if function is None or not self._read(function, destinations[part], sources[part], lengths[part]):
                _move_one_by_one(destinations[part], sources[part], lengths[part])

    def _read(self, function: VectorRead, destinations: Numbers, sources: Numbers, lengths: Numbers) -> bool:
        """One system call; false when it is forbidden here."""
        local = np.stack((destinations, lengths), axis=1)
        remote = np.stack((sources, lengths), axis=1)
        count = lengths.size
        moved = function(os.getpid(), local.ctypes.data, count, remote.ctypes.data, count, 0)
        if moved == int(lengths.sum()):
            return True
        error = ctypes.get_errno()
        if moved < 0 and error in _FORBIDDEN:
            self._forbidden(error)
            return False
        reason = os.strerror(error) if moved < 0 else f"only {moved} of {int(lengths.sum())} bytes were moved"
        raise TransferError(f"copying {count} KV pieces failed: {reason}; their destinations hold garbage")

    def _forbidden(self, error: int) -> None:
        already, self._vector_read = self._vector_read is None, None
        if not already:
            _log.warning(
                "process_vm_readv is forbidden here (%s), so KV is copied piece by piece and competes more with the "
                "engine's thread; allow that call in the container's seccomp profile for full speed",
                os.strerror(error),
            )


def system_calls(
    lengths: Numbers, max_pieces: int = MAX_PIECES, max_bytes: int = MAX_BYTES
) -> Iterator[tuple[int, int]]:
    """Ranges (first, one past the last) of pieces that go into one system call each.

    A single piece is never cut, so a range of one piece may be longer than ``max_bytes``.
    """
    ends = np.cumsum(lengths)
    first = 0
    while first < lengths.size:
        before = int(ends[first - 1]) if first else 0
        fitting = int(np.searchsorted(ends, before + max_bytes, side="right"))
        last = min(max(fitting, first + 1), first + max_pieces)
        yield first, last
        first = last


def _move_one_by_one(destinations: Numbers, sources: Numbers, lengths: Numbers) -> None:
    for destination, source, length in zip(destinations.tolist(), sources.tolist(), lengths.tolist(), strict=True):
        ctypes.memmove(destination, source, length)


class CpuCopier:
    """``DeviceCopier`` for a KV cache in host memory.

    A step has ended when the forward thread says so, hence a fence is ``None`` and not looked at.  Any thread.
    """

    def __init__(self, geometry: KvGeometry, arena: PageArena, move: BatchMove | None = None) -> None:
        self._geometry = geometry
        self._arena = arena
        self._move = move or BatchMove(process_vm_readv())
        bases = [storage.data_ptr() for storage in geometry.storages]
        self._tables = [PieceTable.of(group, bases) for group in geometry.groups]

    def open(self) -> None:
        """Nothing to prepare on a CPU."""

    def close(self) -> None:
        """Nothing to give back on a CPU."""

    def fence(self) -> object:
        """``None``: host memory is written when the step that writes it returns."""
        return None

    def gather(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy ``blocks`` of KV ``group`` into arena ``pages``.  Raises ``TransferError``."""
        block_array, page_array = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        reject_repeats("arena page", page_array)
        kv, paged, lengths = self._addresses(group, block_array, page_array)
        self._move(paged, kv, lengths)

    def scatter(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy arena ``pages`` into ``blocks`` of KV ``group``.  Raises ``TransferError``."""
        block_array, page_array = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        reject_repeats("block", block_array)
        kv, paged, lengths = self._addresses(group, block_array, page_array)
        self._move(kv, paged, lengths)

    def _addresses(self, group: int, blocks: Numbers, pages: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        table = self._tables[group]
        page_bytes = self._arena.array.shape[1]
        paged = table.page_addresses(pages, page_bytes, self._arena.address)
        return table.addresses(blocks), paged, np.tile(table.lengths, blocks.size)
