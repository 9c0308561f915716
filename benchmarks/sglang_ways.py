"""What the benchmark of SGLang's storage measures, way by way; ``sglang_hicache.py`` runs it."""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks._report import Row, rate, ratio, rounds
from benchmarks.sglang_rig import BATCH, Rig, Storage, fresh_hashes, host_pool, pieces

CACHE_BYTES = 192 << 20
"""Batches are taken in turns from at least this much memory: no processor cache holds it."""
ROUND_BYTES = 2 << 30
PASSES = 3
"""How often the sizes are gone through: what makes a machine slow for some seconds does not decide about one of them.

Each time in new memory, which may lie better or worse.
"""
CHAINS = (128, 2048)
LAYOUT_PAGE = 1 << 20

COPY_OUT, COPY_IN = "copy out", "copy in"


def umbp(dram_bytes: int) -> Storage:
    """This pool with so much DRAM and no SSD tier."""
    extra = {
        "backend_name": "umbp",
        "module_path": "umbp_sglang.store",
        "class_name": "UMBPStore",
        "interface_v1": 1,
        "dram_capacity": dram_bytes,
    }
    return Storage("umbp", "dynamic", extra, zero_copy=True)


def file(folder: Path) -> Storage:
    """SGLang's own file backend below ``folder``."""
    return Storage("file", "file", {"file_storage_path": str(folder)}, zero_copy=False)


class Bench:
    """Pages of one size in one layout: the host pool, plain memory of its size, and the backends on it."""

    def __init__(self, page_bytes: int, layout: str, folder: Path | None) -> None:
        self._moved = page_bytes * BATCH
        self._batches = max(2, -(-CACHE_BYTES // self._moved))
        self._pool = host_pool(page_bytes, self._batches * BATCH, layout)
        self._pages = pieces(self._pool)
        # Not from numpy: its large arrays begin 16 bytes into a page, which makes copies to them a third slower.
        self._plain = np.frombuffer(mmap.mmap(-1, len(self._pages) * page_bytes), dtype=np.uint8)
        self._plain = self._plain.reshape(len(self._pages), page_bytes)
        self._plain[:] = 1
        self._folder = folder
        storages = [umbp(self._batches * self._moved)] + ([file(folder)] if folder is not None else [])
        self._rigs = {storage.label: Rig(self._pool, storage) for storage in storages}
        self._stored: dict[str, list[tuple[list[str], int]]] = {label: [] for label in self._rigs}
        self._turn = 0
        self.core_seconds: dict[str, list[float]] = {}
        for label in self._rigs:
            self._fill(label)

    @property
    def pieces_per_page(self) -> int:
        """Contiguous pieces of host memory that a page consists of."""
        return len(self._pages[0])

    def measure(self, count: int) -> dict[str, list[float]]:
        """GB/s of every way, in interleaved rounds; :attr:`core_seconds` has what each cost."""
        ways: dict[str, Callable[[], float]] = {COPY_OUT: lambda: self._copy(out=True)}
        ways |= {f"{label} put": lambda label=label: self._put(label) for label in self._rigs}  # type: ignore[misc]
        ways[COPY_IN] = lambda: self._copy(out=False)
        ways |= {f"{label} get": lambda label=label: self._get(label) for label in self._rigs}  # type: ignore[misc]
        # Small batches take a millisecond: more rounds, so that a neighbour's time slice does not decide.
        return rounds(ways, max(count, min(10 * count, ROUND_BYTES // self._moved)))

    def close(self) -> None:
        """Give everything back."""
        for rig in self._rigs.values():
            rig.close()

    def _fill(self, label: str) -> None:
        """Touch all memory that the backend will use, and see that what comes back is what was put."""
        for batch in range(self._batches if label == "umbp" else 1):
            self._put(label, batch)
        hashes, first = self._stored[label][-1]
        words = self._pool.kv_buffer.view(-1).view(torch.int64)  # among bfloat16 there are some that equal nothing
        before = words.clone()
        for page in self._pages[first : first + BATCH]:
            for piece in page:
                piece[:] = 0
        self._rigs[label].get(hashes, first)()
        if not torch.equal(before, words):
            raise SystemExit(f"{label}: the bytes that came back are not those that were put")

    def _next(self) -> int:
        """The first page of the next batch."""
        self._turn += 1
        return self._turn % self._batches * BATCH

    def _copy(self, *, out: bool) -> float:
        first = self._next()
        pairs = []
        for page, flat in zip(self._pages[first : first + BATCH], self._plain[first : first + BATCH], strict=True):
            for number, piece in enumerate(page):
                plain = flat[number * piece.nbytes : (number + 1) * piece.nbytes]
                pairs.append((plain, piece) if out else (piece, plain))

        def work() -> None:
            for target, source in pairs:
                np.copyto(target, source)

        return self._measured(COPY_OUT if out else COPY_IN, work)

    def _put(self, label: str, batch: int | None = None) -> float:
        """A put of hashes that the backend does not have."""
        first = self._next() if batch is None else batch * BATCH
        hashes = fresh_hashes()
        figure = self._measured(f"{label} put", self._rigs[label].put(hashes, first))
        stored = self._stored[label]
        stored.append((hashes, first))
        if label == "file" and self._folder is not None:
            _forget_files(self._folder, keep=hashes)
        return figure

    def _get(self, label: str) -> float:
        """A get of what was put some batches ago, into the pages that it came from."""
        stored = self._stored[label]
        age = min(len(stored), max(1, self._batches // 2)) if label == "umbp" else 1
        hashes, first = stored[-age]
        return self._measured(f"{label} get", self._rigs[label].get(hashes, first))

    def _measured(self, name: str, work: Callable[[], object]) -> float:
        start = time.process_time()
        figure = rate(self._moved, work)
        self.core_seconds.setdefault(name, []).append((time.process_time() - start) / self._moved * 1e9)
        return figure


def _forget_files(folder: Path, keep: Sequence[str]) -> None:
    """Remove what the file backend has in ``folder``, but for the pages ``keep``."""
    kept = set(keep)
    for path in folder.iterdir():
        if path.name[:64] not in kept:
            path.unlink()


class Figures:
    """What several benches of the same kind measured, one after the other."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}
        """GB/s of every way, round by round."""
        self.core_seconds: dict[str, list[float]] = {}
        """Seconds of all threads together per GB."""
        self.pieces_per_page = 0

    def add(self, page_bytes: int, layout: str, count: int, folder: Path | None) -> None:
        """Measure once more, in new memory."""
        with closed(Bench(page_bytes, layout, folder)) as bench:
            for name, found in bench.measure(count).items():
                self.rates.setdefault(name, []).extend(found)
                self.core_seconds.setdefault(name, []).extend(bench.core_seconds[name])
            self.pieces_per_page = bench.pieces_per_page

    def reached_by(self, label: str) -> Row:
        """What one backend reached."""
        row: Row = {"backend": label}
        for what, ceiling in (("put", COPY_OUT), ("get", COPY_IN)):
            reached = self.rates[f"{label} {what}"]
            row |= {
                f"{what}, GB/s": statistics.median(reached),
                f"copy for {what}, GB/s": statistics.median(self.rates[ceiling]),
                f"{what} of copy": ratio(reached, self.rates[ceiling]),
                f"{what}, core s/GB": statistics.median(self.core_seconds[f"{label} {what}"]),
                f"copy for {what}, core s/GB": statistics.median(self.core_seconds[ceiling]),
            }
        return row


def by_size(sizes: Sequence[int], count: int, folder: Path) -> list[Row]:
    """Both backends with pages of each size in SGLang's default layout."""
    figures = {nbytes: Figures() for nbytes in sizes}
    for _ in range(PASSES):
        for nbytes in sizes:
            figures[nbytes].add(nbytes, "page_first", -(-count // PASSES), folder / str(nbytes))
    return [
        {"page": size(nbytes)} | figures[nbytes].reached_by(label) for nbytes in sizes for label in ("umbp", "file")
    ]


def by_layout(layouts: Sequence[str], count: int) -> list[Row]:
    """This pool with pages of 1 MiB in each layout."""
    figures = {layout: Figures() for layout in layouts}
    for _ in range(PASSES):
        for layout in layouts:
            figures[layout].add(LAYOUT_PAGE, layout, -(-count // PASSES), None)
    rows: list[Row] = []
    for layout, found in figures.items():
        each = found.pieces_per_page
        where: Row = {"layout": layout, "pieces of a page": each, "piece": size(LAYOUT_PAGE // each)}
        rows.append(where | found.reached_by("umbp"))
    return rows


def exists(count: int, folder: Path) -> list[Row]:
    """The question how many of a chain's pages are there, in microseconds per call."""
    pool = host_pool(64 << 10, 2 * BATCH, "page_first")
    rows: list[Row] = []
    for storage in (umbp(4096 * (64 << 10)), file(folder)):
        rig = Rig(pool, storage)
        chain = fresh_hashes(2048)
        for first in range(0, len(chain), BATCH):
            rig.put(chain[first : first + BATCH], 0)()
        (absent,) = fresh_hashes(1)
        for keys in CHAINS:
            for what, asked in (("all there", chain[:keys]), ("the first is missing", [absent, *chain[1:keys]])):
                expected = 0 if asked[0] == absent else keys
                rows.append({"backend": storage.label, "keys": keys, "which": what} | asks(rig, asked, expected, count))
        rig.close()
    return rows


def asks(rig: Rig, hashes: Sequence[str], expected: int, count: int) -> Row:
    """The times of one question."""
    times = []
    for _ in range(20 * count):
        asked = [key[:1] + key[1:] for key in hashes]  # what an engine asks for was never hashed by Python before
        start = time.perf_counter()
        found = rig.exists(asked)
        times.append((time.perf_counter() - start) * 1e6)
        if found != expected:
            raise SystemExit(f"{found} pages of {len(hashes)} exist, expected {expected}")
    return {"p50 us": statistics.median(times), "p99 us": sorted(times)[len(times) * 99 // 100]}


@contextmanager
def closed(bench: Bench) -> Iterator[Bench]:
    """``bench``, closed at the end."""
    try:
        yield bench
    finally:
        bench.close()


def size(nbytes: int) -> str:
    """``nbytes`` in the larger unit that divides it."""
    return f"{nbytes >> 10} KiB" if nbytes < 1 << 20 else f"{nbytes >> 20} MiB"
