"""A plug-in of both engines for ``benchmarks/reporting_engines.py``: when did a block come to a tier, by the engine?

``BENCHMARK_STAMPS`` names a folder; each process that has something to say writes a file there, a line per block: tier,
published hash, nanoseconds of the monotonic clock, which all processes of a machine share.  The moment is the one at
which the engine's own thread says so: vLLM's block pool has cached the block, SGLang's scheduler publishes the event,
our pool's books have the block.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HBM, DRAM = 1, 2


class Stamps:
    """The file of this process; any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._file: Any = None

    def write(self, tier: int, hashes: Iterable[int], now: int) -> None:
        lines = "".join([f"{tier} {each} {now}\n" for each in hashes])
        if lines:
            with self._lock:
                if self._file is None:
                    self._file = (self._folder / str(os.getpid())).open("a", encoding="ascii", buffering=1 << 16)
                self._file.write(lines)
                self._file.flush()


def in_vllm() -> None:
    """Entry point of ``vllm.general_plugins``."""
    if "BENCHMARK_STAMPS" not in os.environ:
        return
    from umbp_core.ids import GROUP_BYTES
    from umbp_vllm.hbm_watch import BlockLog
    from umbp_vllm.reporting import PoolTeller

    end = -GROUP_BYTES
    stamps = Stamps(Path(os.environ["BENCHMARK_STAMPS"]))

    def number(key: bytes) -> int:
        return int.from_bytes(key[end - 8 : end], "big")

    def noted(_log: Any, blocks: Any, now: int) -> None:
        if isinstance(blocks, (list, tuple)):
            stamps.write(HBM, [number(block.block_hash) for block in blocks if block.block_hash is not None], now)

    def changed(_teller: Any, changes: Any, now: int) -> None:
        _changed(stamps, changes, now, number)

    BlockLog.note = _before(BlockLog.note, noted)  # type: ignore[method-assign]
    PoolTeller.changed = _before(PoolTeller.changed, changed)  # type: ignore[method-assign]


def in_sglang() -> None:
    """Entry point of ``sglang.srt.plugins``."""
    if "BENCHMARK_STAMPS" not in os.environ:
        return
    from sglang.srt.disaggregation.kv_events import BlockStored

    from umbp_sglang.placements import TIER_OF
    from umbp_sglang.pool_teller import PoolTeller
    from umbp_sglang.reporting import NodeReporting

    stamps = Stamps(Path(os.environ["BENCHMARK_STAMPS"]))

    def told(_reporting: Any, events: Any, now: int) -> None:
        for event in events:
            if type(event) is BlockStored:
                stamps.write(int(TIER_OF[event.medium]), event.block_hashes, now)

    def changed(_teller: Any, _life: int, _part: int, changes: Any, _holdings: Any, now: int) -> None:
        _changed(stamps, changes, now, lambda key: int.from_bytes(key[:8], "big", signed=True))

    NodeReporting.tell_events = _before(NodeReporting.tell_events, told)  # type: ignore[method-assign]
    PoolTeller.changed = _before(PoolTeller.changed, changed)  # type: ignore[method-assign]


def _changed(stamps: Stamps, changes: Any, now: int, number: Callable[[bytes], int]) -> None:
    from umbp_core.directory import EventKind

    for change in changes:
        if change.kind is EventKind.ADDED:
            stamps.write(int(change.tier), map(number, change.keys), now)


def _before(original: Callable[..., Any], look: Callable[..., None]) -> Callable[..., Any]:
    """``original``, whose moment is noted before it is called and written down after it."""

    def method(*args: Any) -> Any:
        now = time.monotonic_ns()
        answer = original(*args)
        look(*args, now)
        return answer

    return method
