"""What the connector costs vLLM's scheduler per engine step.

``python benchmarks/leader.py [--quick] [--out FOLDER]``, with a vLLM in the environment and from a checkout.

vLLM's own scheduler, block pool and requests run a decode batch.  Only the connector's scheduler-side calls are timed
(match, allocation, metadata, results, finish, events, statistics), summed over a step.  The workers are played: every
op ends well in its step, and no transfer thread competes for the interpreter, as in a real engine, where the workers
are other processes.  With ``--report`` the engine also tells a master, a process of its own, what it holds; then the
reporter's threads do compete, and a last table has what noting touched blocks adds to calls of vLLM's block pool.
In the mix a step has four changes: one request arrives with a hit of four blocks, one ends,
two fill a block.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _report
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

import umbp_vllm
from tests.vllm.harness.spec import EngineSpec, make_geometry, make_vllm_config  # noqa: TID251 - runs from a checkout
from umbp_connectors.reporting.feed import Feed
from umbp_core.ops import CHECKSUM_BYTES, Direction, LeaderTransferRequest, OpResult, OpStatus
from umbp_vllm import block_hooks
from umbp_vllm.hbm_watch import BlockLog
from umbp_vllm.metadata import PROTOCOL_VERSION, HandshakeHello, RankHello, WorkerReport

TARGETS_US = ((80, 1000), (50, 500))
"""p50 and p99: of the connector, and the stricter ones of the whole protocol."""
TIMED = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "get_external_cache_hit_sources",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
    "get_kv_connector_stats",
    "take_events",
    "has_pending_block_frees",
    "has_pending_push_work",
)


@dataclass(frozen=True)
class Load:
    """A batch: how many requests run, and what happens per step."""

    running: int
    filled: int
    """Requests that fill a block, per step, on average."""
    arrivals: int = 0
    """Requests that arrive with a hit, and as many that end, per step."""
    hit_blocks: int = 4
    """Of each hit."""

    @property
    def tokens(self) -> int:
        """The longest prompt."""
        return self.block_size * (self.hit_blocks + 2)

    @property
    def block_size(self) -> int:
        """Each running request fills one block per this many steps."""
        return max(16, self.running // self.filled) if self.filled else 1024


class Engine:
    """vLLM's scheduler with the connector's leader, and workers that always succeed."""

    def __init__(self, load: Load, steps: int, master: str = "") -> None:
        umbp_vllm.register()
        self.load = load
        size = load.block_size
        longest = load.tokens + steps
        spec = EngineSpec(
            connector="umbp",
            extra={"dram_capacity": "1GiB", "log_level": "error", "master_address": master},
            block_size=size,
            num_blocks=(load.running + 64) * (longest // size + 2),
            max_model_len=longest,
            max_num_seqs=load.running + 64,
            max_num_batched_tokens=load.tokens * (load.running + 64),
        )
        config = make_vllm_config(spec)
        geometry = make_geometry(spec, config)
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=geometry.scheduler,
            structured_output_manager=StructuredOutputManager(config),
            block_size=geometry.scheduler_block_size,
            hash_block_size=geometry.hash_block_size,
            log_stats=True,
        )
        hash_function = get_hash_fn_by_name(spec.hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(geometry.hash_block_size, hash_function)
        self._names = map(str, itertools.count())
        self.seconds = 0.0
        self.seen: Counter[str] = Counter()
        """Changes so far."""
        self._connect()

    def _connect(self) -> None:
        connector = self.scheduler.connector
        leader = connector.leader
        hello = RankHello(
            version=PROTOCOL_VERSION,
            world_rank=0,
            writer_rank=0,
            identity=leader._setup.identity,
            layout=bytes(32),
            page_bytes=4096,
            dram_pages=200_000,
            ssd_slots=0,
            slot_bytes=0,
            object_bytes=(4096,),
        )
        connector.set_xfer_handshake_metadata_pp_aware({(0, 0): HandshakeHello(hello)})
        if leader.pool is None:
            raise SystemExit("the leader's pool did not open")
        for name in TIMED:
            setattr(connector, name, self._timed(getattr(connector, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return call

    def add(self, prompt: list[int]) -> str:
        """A request with an endless answer."""
        name = next(self._names)
        params = SamplingParams(max_tokens=1 << 20, ignore_eos=True)
        self.scheduler.add_request(Request(name, prompt, params, None, block_hasher=self._hasher))
        return name

    def step(self) -> None:
        """One step."""
        output = self.scheduler.schedule()
        self.scheduler.update_from_output(output, self._executed(output))
        self.scheduler.has_requests()

    def _executed(self, output: SchedulerOutput) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        report = KVConnectorOutput()
        ops: list[LeaderTransferRequest] = output.kv_connector_metadata.ops
        self.seen["ends"] += len(output.finished_req_ids)
        self.seen["loads"] += sum(op.direction is Direction.LOAD for op in ops)
        self.seen["fills"] += sum(len(op.blocks) for op in ops if op.direction is Direction.STORE)
        if ops:
            report.kv_connector_worker_meta = WorkerReport(results={0: [_success(op) for op in ops]})
            report.finished_recving = {op.request_id for op in ops if op.direction is Direction.LOAD} or None
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[7] for _ in names],
            kv_connector_output=report,
        )


def _success(op: LeaderTransferRequest) -> OpResult:
    checksums = bytes(CHECKSUM_BYTES * len(op.blocks)) if op.direction is Direction.STORE else b""
    return OpResult(op.op_id, op.request_id, op.direction, OpStatus.DONE, checksums=checksums)


class Batch:
    """Keeps ``load.running`` requests running while some end and others arrive, each with a hit of its own."""

    def __init__(self, engine: Engine, steps: int) -> None:
        self.engine = engine
        self.size = engine.load.block_size
        self._turn = itertools.count()
        documents = engine.load.running + steps * engine.load.arrivals
        for first in range(0, documents, 32):
            names = [engine.add(self._document(index)) for index in range(first, min(first + 32, documents))]
            for _ in range(3):
                engine.step()
            engine.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
        for _ in range(3):
            engine.step()
        if not engine.scheduler.reset_prefix_cache():
            raise SystemExit("vLLM's own prefix cache could not be emptied")
        self.alive = [engine.add(self._next()) for _ in range(engine.load.running)]
        for _ in range(6):
            engine.step()

    def _document(self, index: int) -> list[int]:
        """Whole blocks that no other request has."""
        return [index] + [1] * (self.engine.load.hit_blocks * self.size - 1)

    def _next(self) -> list[int]:
        """The next document, and a tail so that blocks fill up at different steps."""
        index = next(self._turn)
        tail = index * self.size // self.engine.load.running % self.size
        return self._document(index) + [2] * (1 + tail)

    def step(self) -> float:
        """The changes of one step, then the step; microseconds of the connector in it."""
        engine = self.engine
        engine.seconds = 0.0
        for _ in range(self.engine.load.arrivals):
            self.engine.scheduler.finish_requests(self.alive.pop(0), RequestStatus.FINISHED_ABORTED)
            self.alive.append(self.engine.add(self._next()))
        engine.step()
        return engine.seconds * 1e6


WARM_UP = 20


def measure(load: Load, steps: int, master: str = "") -> _report.Row:
    """Microseconds per step under ``load``, while a ``master`` is told of it if one is named."""
    engine = Engine(load, steps + 2 * WARM_UP, master)
    batch = Batch(engine, steps + 2 * WARM_UP)
    for _ in range(WARM_UP):
        batch.step()
    gc.collect()
    gc.freeze()  # as the engine does after its start
    seen = Counter(engine.seen)
    times = sorted(batch.step() for _ in range(steps))
    engine.seen.subtract(seen)
    engine.scheduler.shutdown()
    gc.unfreeze()
    return {
        "running": load.running,
        "arrive": engine.seen["loads"] / steps,
        "end": engine.seen["ends"] / steps,
        "fill a block": engine.seen["fills"] / steps,
        "blocks per hit": load.hit_blocks,
        "p10 us": times[steps // 10],
        "p50 us": statistics.median(times),
        "p99 us": times[int(steps * 0.99)],
    }


def touches(calls: int, blocks: int) -> _report.Row:
    """Microseconds that noting adds to a step in which ``calls`` requests each get and fill ``blocks`` blocks.

    The block pool is one that does nothing, so that what is left is ours; telling the step's notes is part of it.
    """
    taken = list(range(blocks))
    pool = SimpleNamespace(
        blocks=taken,
        get_new_blocks=lambda num_blocks: taken,
        cache_full_blocks=lambda *arguments, **more: None,
        **dict.fromkeys(
            ("cache_partial_block", "move_block_hashes", "evict_blocks", "reset_prefix_cache"), lambda *arguments: None
        ),
    )

    def step() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            pool.get_new_blocks(blocks)
            pool.cache_full_blocks(
                request=None,
                blocks=taken,
                num_cached_blocks=0,
                num_full_blocks=blocks,
                block_size=16,
                kv_cache_group_id=0,
                block_mask=None,
            )
        notes = log.take()
        if notes:
            feed.tell(sum(map(len, notes)), notes)
        return (time.perf_counter() - begin) * 1e6

    log = BlockLog()
    feed: Feed[object] = Feed("hbm", lambda notes: (), lambda: None, threading.Event(), max_waiting=1 << 60)
    without = statistics.median(step() for _ in range(2000))
    block_hooks.watch_blocks(pool, log.note, lambda: None)
    watched = []
    for _ in range(2000):
        watched.append(step())
        feed.take()
    return {"calls": 2 * calls, "blocks": 2 * calls * blocks, "p50 us": statistics.median(watched) - without}


@contextlib.contextmanager
def own_master() -> Iterator[str]:
    """``umbp master`` on a free port; its address."""
    command = [sys.executable, "-c", "from umbp_connectors.cli import main; main()", "master"]
    listen = [f"--{door}=127.0.0.1:0" for door in ("listen", "native-listen", "metrics-listen")]
    with subprocess.Popen([*command, *listen], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            doors = dict(pair.split("=", 1) for pair in process.stdout.readline().split() if "=" in pair)
            yield f"umbp://{doors['native']}"
        finally:
            process.kill()


def reported(loads: list[Load], steps: int) -> dict[str, list[_report.Row]]:
    """The tables with a master."""
    with own_master() as master:
        told = [measure(load, steps, master) for load in loads]
    touched = [touches(calls, blocks) for calls, blocks in ((1, 1), (16, 1), (1, 512), (4, 256))]
    return {"The same while a master is told": told, "Noting touched blocks, per step": touched}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--report", action="store_true", help="with a master that is told what the engine holds, too")
    parser.add_argument("--out", type=Path, default=_report.OUT)
    arguments = parser.parse_args()
    steps = 100 if arguments.quick else 1000
    mixed = [Load(running, filled=2, arrivals=1) for running in (1, 64, 256, 1024)]
    alike = [Load(running, filled=0, arrivals=1) for running in (1, 64, 256, 1024)]
    others = [
        Load(256, filled=0),
        Load(256, filled=4),
        Load(256, filled=16),
        Load(256, filled=2, arrivals=8),
        Load(64, filled=4, arrivals=1, hit_blocks=128),
    ]
    sections = {
        "Four changes per step": [measure(load, steps) for load in mixed],
        "One arrives and one ends, blocks of 1024 tokens": [measure(load, steps) for load in alike],
        "Other loads": [measure(load, steps) for load in others],
    }
    if arguments.report:
        sections |= reported([*mixed, *others], steps)
    notes = [
        "Targets with 256 running requests and four changes: {}; and the stricter ones {}.".format(
            *(f"p50 {p50} us, p99 {p99} us" for p50, p99 in TARGETS_US)
        ),
        "With four changes per step, blocks and hits are the larger the more requests run, so that as many fill up.",
        "Sum of all scheduler-side calls of the connector in one step, with vLLM's scheduler making them.",
        "Clock time: on a machine that others use too, p10 is what the connector costs and p99 what they do.",
    ]
    print(_report.write("leader", "The connector's cost on vLLM's scheduler thread", sections, notes, arguments.out))


if __name__ == "__main__":
    main()
