"""Speed of the copies between KV blocks in host memory and arena pages, against one large memcpy.

``python benchmarks/copiers.py [--rounds N] [--out FOLDER]``, with a vLLM in the environment.

Each way of copying runs alone and next to a thread that never gives the GIL back by itself, as an engine's step loop
does.  One thread copies; core seconds say most on a machine that others use too.  Set ``OMP_NUM_THREADS=1`` to compare
with torch on equal terms.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import _report
import numpy as np
import torch

from umbp_vllm.copier_cpu import CpuCopier
from umbp_vllm.geometry import GroupGeometry, KvGeometry, Region, merged

CEILING = "one memcpy of the same size"


@dataclass(frozen=True)
class Model:
    """A KV cache as vLLM lays it out on CPUs: layers outermost, 128 tokens per block."""

    name: str
    layers: int
    page_bytes: int
    batch: int
    blocks: int


MODELS = (
    Model("tiny-llama", layers=4, page_bytes=64 << 10, batch=128, blocks=1024),
    Model("llama-200m", layers=16, page_bytes=256 << 10, batch=48, blocks=96),
)


class Pages:
    """Arena pages, already present in memory."""

    def __init__(self, pages: int, page_bytes: int) -> None:
        self.array = np.ones((pages, page_bytes), np.uint8)
        self.address = self.array.ctypes.data


def geometry_of(model: Model) -> KvGeometry:
    """The geometry of ``model`` over memory that is present."""
    page = model.page_bytes
    regions = [Region(0, layer * model.blocks * page, 1, page, page, page) for layer in range(model.layers)]
    storage = torch.ones(model.layers * model.blocks * page, dtype=torch.uint8)
    group = GroupGeometry(0, "full_attention", 128, (), merged(regions))
    return KvGeometry(model.blocks, (group,), (storage,))


Copy = Callable[[Sequence[int], Sequence[int]], None]


def process_vm_readv(geometry: KvGeometry, arena: Pages) -> Copy:
    """System calls of up to 1024 pieces each, on the own process."""
    region = geometry.groups[0].regions[0]
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    function.restype = ctypes.c_ssize_t
    number, vector, count = ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong
    function.argtypes = (number, vector, count, vector, count, count)
    kv, in_page = piece_addresses(geometry)

    def copy(blocks: Sequence[int], to: Sequence[int]) -> None:
        sources = (np.asarray(blocks)[:, None] * region.block_stride + kv).reshape(-1)
        targets = (arena.address + np.asarray(to)[:, None] * arena.array.shape[1] + in_page).reshape(-1)
        lengths = np.full(len(sources), region.piece_bytes)
        vectors = [np.stack((addresses, lengths), axis=1) for addresses in (targets, sources)]
        for first in range(0, len(sources), 1024):
            local, remote = (part[first : first + 1024] for part in vectors)
            function(os.getpid(), local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0)

    return copy


def memmove_per_piece(geometry: KvGeometry, arena: Pages) -> Copy:
    """One ``memmove`` through ctypes per piece."""
    region = geometry.groups[0].regions[0]
    kv, in_page = (addresses.tolist() for addresses in piece_addresses(geometry))
    page_bytes = arena.array.shape[1]

    def copy(blocks: Sequence[int], to: Sequence[int]) -> None:
        for block, page in zip(blocks, to, strict=True):
            source, target = block * region.block_stride, arena.address + page * page_bytes
            for begin, at in zip(kv, in_page, strict=True):
                ctypes.memmove(target + at, source + begin, region.piece_bytes)

    return copy


def piece_addresses(geometry: KvGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Where block 0's pieces begin, as addresses, and where they lie in an object."""
    region = geometry.groups[0].regions[0]
    pieces = np.arange(region.pieces)
    return geometry.storages[0].data_ptr() + pieces * region.piece_stride, pieces * region.piece_bytes


def index_select(geometry: KvGeometry, arena: Pages) -> Copy:
    """torch ``index_select`` into a contiguous tensor, then ``index_copy_`` into the pages."""
    region = geometry.groups[0].regions[0]
    words = region.piece_bytes // 8
    kv = geometry.storages[0].view(torch.int64).view(region.pieces, geometry.num_blocks, words).transpose(0, 1)
    pages = torch.from_numpy(arena.array).view(torch.int64).view(-1, region.pieces, words)

    def copy(blocks: Sequence[int], to: Sequence[int]) -> None:
        pages.index_copy_(0, torch.tensor(to), kv.index_select(0, torch.tensor(blocks)))

    return copy


def numpy_per_block(geometry: KvGeometry, arena: Pages) -> Copy:
    """One numpy assignment per block."""
    region = geometry.groups[0].regions[0]
    kv = geometry.storages[0].numpy().view(np.int64).reshape(region.pieces, geometry.num_blocks, -1)
    pages = arena.array.view(np.int64).reshape(len(arena.array), region.pieces, -1)

    def copy(blocks: Sequence[int], to: Sequence[int]) -> None:
        for block, page in zip(blocks, to, strict=True):
            pages[page] = kv[:, block]

    return copy


def ways(geometry: KvGeometry, arena: Pages) -> dict[str, Copy]:
    """All ways of gathering, ours first, and our scatter."""
    ours = CpuCopier(geometry, arena)
    ours.open()
    return {
        "our gather": lambda blocks, pages: ours.gather(0, blocks, pages, None),
        "our scatter": lambda blocks, pages: ours.scatter(0, blocks, pages, None),
        "process_vm_readv": process_vm_readv(geometry, arena),
        "memmove per piece": memmove_per_piece(geometry, arena),
        "numpy per block": numpy_per_block(geometry, arena),
        "torch index_select + index_copy_": index_select(geometry, arena),
    }


@contextmanager
def busy_engine() -> Iterator[None]:
    """A thread that computes in Python all the time, so that the GIL is only ever taken from it."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(2000))

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass
class Times:
    """Seconds of each call of one way: by the clock, and of the calling thread on a core."""

    wall: list[float] = field(default_factory=list)
    core: list[float] = field(default_factory=list)


def times_of(works: dict[str, Callable[[int], object]], rounds: int) -> dict[str, Times]:
    """Times of each call, round by round and work by work, after one round that does not count.

    Taking turns lets a disturbance of the machine hit all works alike.
    """
    times = {name: Times() for name in works}
    for number in range(-1, rounds):
        for name, work in works.items():
            wall, core = time.perf_counter(), time.thread_time()
            work(max(number, 0))
            if number >= 0:
                times[name].core.append(time.thread_time() - core)
                times[name].wall.append(time.perf_counter() - wall)
    return times


def measure(model: Model, rounds: int) -> list[_report.Row]:
    """One row per way of copying, with scattered blocks and pages: the best call alone, the median next to others."""
    geometry = geometry_of(model)
    arena = Pages(model.blocks, geometry.page_bytes)
    nbytes = model.batch * geometry.object_bytes(0)
    random = np.random.default_rng(1)
    batches = [[random.permutation(model.blocks)[: model.batch].tolist() for _ in range(2)] for _ in range(rounds)]
    source, target = geometry.storages[0].data_ptr(), arena.address
    works: dict[str, Callable[[int], object]] = {
        CEILING: lambda _: ctypes.memmove(target, source, nbytes),
        **{name: lambda i, copy=copy: copy(*batches[i]) for name, copy in ways(geometry, arena).items()},
    }
    alone = times_of(works, rounds)
    with busy_engine():
        busy = times_of(works, rounds)
    best = {name: min(times.core) for name, times in alone.items()}
    return [
        {
            "object KiB": geometry.object_bytes(0) >> 10,
            "batch": model.batch,
            "way": name,
            "GB/s": round(nbytes / min(alone[name].wall) / 1e9, 2),
            "GB per core second": round(nbytes / best[name] / 1e9, 2),
            "of memcpy": round(best[CEILING] / best[name], 2),
            "GB/s, busy GIL": round(nbytes / statistics.median(busy[name].wall) / 1e9, 2),
        }
        for name in works
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="measured calls per way")
    parser.add_argument("--out", type=Path, default=_report.OUT)
    arguments = parser.parse_args()
    sections = {model.name: measure(model, arguments.rounds) for model in MODELS}
    notes = [
        "Scattered blocks and pages, one thread: the best call alone, the median next to a thread that keeps the GIL.",
        f"'of memcpy' is by core seconds, against {CEILING}.",
    ]
    title = "Copies between KV blocks in host memory and arena pages"
    print(_report.write("copiers", title, sections, notes, arguments.out))


if __name__ == "__main__":
    main()
