"""How fast the pool is on this machine, beside what the machine gives in the same minute."""

from __future__ import annotations

import contextlib
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umbp_connectors.pool.buffers import Bytes, round_up
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.settings import LocalPoolConfig
from umbp_connectors.pool.slab import ALIGNMENT, SlabFile
from umbp_core.errors import TierUnavailable
from umbp_core.ids import Identity, RankScope
from umbp_core.outcomes import GetStatus, PutStatus

_EXISTS_KEYS = 2048
_WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement: GB/s of the pool and of the ceiling, or microseconds where there is no ceiling."""

    what: str
    value: float
    unit: str
    ceiling: float | None = None

    @property
    def ratio(self) -> float | None:
        """How much of the ceiling is reached."""
        return None if not self.ceiling else self.value / self.ceiling


def measure(object_bytes: int, objects: int, rounds: int, threads: int, ssd_dir: Path | None) -> list[Figure]:
    """Put and get ``objects`` objects at once, ``rounds`` times, with ``threads`` threads; medians.

    With ``ssd_dir`` the SSD tier too, in a folder of its own there, which is removed again.  Raises ``UmbpError``.
    """
    figures = _memory(object_bytes, objects, rounds, threads)
    if ssd_dir is not None:
        try:
            folder = tempfile.TemporaryDirectory(prefix="umbp-bench-", dir=ssd_dir)
        except OSError as error:
            raise TierUnavailable(f"{ssd_dir} cannot be written ({error.strerror}); name another folder") from error
        with folder as path:
            figures += _disk(object_bytes, objects, rounds, threads, Path(path))
    return figures


def _memory(object_bytes: int, objects: int, rounds: int, threads: int) -> list[Figure]:
    source, target = _objects(object_bytes, objects), _objects(object_bytes, objects)
    moved = object_bytes * objects
    times: dict[str, list[float]] = {"copy": [], "put": [], "get": [], "exists": []}
    with ThreadPoolExecutor(threads) as executor, _pool(object_bytes, 2 * objects, threads) as pool:
        for turn in range(rounds):
            keys = _keys(turn, objects)
            times["copy"].append(_timed(lambda: _copy_all(executor, threads, target, source)))
            times["put"].append(_timed(lambda: _check(pool.put(keys, source), PutStatus.STORED)))  # noqa: B023
            times["get"].append(_timed(lambda: _check(pool.get(keys, target), GetStatus.DRAM)))  # noqa: B023
            asked = (keys * (_EXISTS_KEYS // objects + 1))[:_EXISTS_KEYS]
            times["exists"].append(_timed(lambda: pool.exists(asked)))  # noqa: B023
    ceiling = moved / statistics.median(times["copy"]) / 1e9
    rates = {name: moved / statistics.median(times[name]) / 1e9 for name in ("put", "get")}
    return [
        Figure("DRAM put", rates["put"], "GB/s", ceiling),
        Figure("DRAM get", rates["get"], "GB/s", ceiling),
        Figure(f"exists of {_EXISTS_KEYS} keys", statistics.median(times["exists"]) * 1e6, "us"),
    ]


def _disk(object_bytes: int, objects: int, rounds: int, threads: int, folder: Path) -> list[Figure]:
    slot = round_up(object_bytes, ALIGNMENT)
    moved = object_bytes * objects
    capacity = 2 * objects * (slot + 4096) + (4 << 20)
    times: dict[str, list[float]] = {"write": [], "read": [], "put": [], "get": []}
    buffers = [np.frombuffer(mmap.mmap(-1, slot), dtype=np.uint8) for _ in range(objects)]
    for buffer, one in zip(buffers, _objects(object_bytes, objects), strict=True):
        buffer[:object_bytes] = one
    source = [buffer[:object_bytes] for buffer in buffers]
    slab = SlabFile(folder / "ceiling.bin", slot, objects)
    slab.open()
    with contextlib.closing(slab), ThreadPoolExecutor(_io_threads(threads)) as executor:
        for turn in range(rounds):
            keys = _keys(turn, objects)
            times["write"].append(_timed(lambda: _write_all(executor, slab, buffers)))
            times["read"].append(_timed(lambda: _each(executor, slab.read_into, buffers)))
            with _pool(object_bytes, objects, threads, folder, capacity) as pool:
                times["put"].append(_timed(lambda: _store(pool, keys, source)))  # noqa: B023
            with _pool(object_bytes, objects, threads, folder, capacity) as pool:
                times["get"].append(_timed(lambda: _check(pool.get(keys, source), GetStatus.SSD)))  # noqa: B023
    rates = {name: moved / statistics.median(times[name]) / 1e9 for name in times}
    return [
        Figure("SSD put, until it is on the device", rates["put"], "GB/s", rates["write"]),
        Figure("SSD get", rates["get"], "GB/s", rates["read"]),
    ]


def _pool(
    object_bytes: int, pages: int, threads: int, folder: Path | None = None, capacity: int = 0
) -> contextlib.closing[LocalPool]:
    config = LocalPoolConfig(
        object_bytes,
        pages * round_up(object_bytes, ALIGNMENT),
        folder,
        capacity,
        copy_threads=threads,
        io_threads=_io_threads(threads),
        demote_threads=_io_threads(threads),
        shared_memory=False,
    )
    pool = LocalPool(Identity("umbp-bench", bytes(32), RankScope()), config)
    pool.open()
    pool.wait_prefaulted(_WAIT_S)
    return contextlib.closing(pool)


def _io_threads(threads: int) -> int:
    """As many transfers are in flight in the pool as in what it is compared with."""
    return max(threads, 4)


def _objects(object_bytes: int, objects: int) -> list[Bytes]:
    """Memory that is present, every object another."""
    whole = np.empty((objects, object_bytes), dtype=np.uint8)
    whole[:] = np.arange(objects, dtype=np.uint8)[:, None]
    return list(whole)


def _keys(turn: int, objects: int) -> list[bytes]:
    return [number.to_bytes(32, "big") + bytes(4) for number in range(turn * objects, (turn + 1) * objects)]


def _copy_all(executor: ThreadPoolExecutor, threads: int, targets: Sequence[Bytes], sources: Sequence[Bytes]) -> None:
    def share(number: int) -> None:
        for target, source in zip(targets[number::threads], sources[number::threads], strict=True):
            np.copyto(target, source)

    list(executor.map(share, range(threads)))


def _each(executor: ThreadPoolExecutor, move: Callable[[int, Bytes], None], buffers: Sequence[Bytes]) -> None:
    list(executor.map(move, range(len(buffers)), buffers))


def _write_all(executor: ThreadPoolExecutor, slab: SlabFile, buffers: Sequence[Bytes]) -> None:
    _each(executor, slab.write_from, buffers)
    slab.sync()


def _store(pool: LocalPool, keys: Sequence[bytes], source: Sequence[Bytes]) -> None:
    _check(pool.put(keys, source), PutStatus.STORED)
    if not pool.flush(_WAIT_S):
        raise TierUnavailable("what was put did not reach the disk; is it full?")


def _check(statuses: Sequence[object], expected: object) -> None:
    wrong = [status for status in statuses if status is not expected]
    if wrong:
        raise TierUnavailable(f"{len(wrong)} of {len(statuses)} objects were {wrong[0]} instead of {expected}")


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
