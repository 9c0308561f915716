"""A hundred thousand requests, ended in every phase of their lives, leave nothing behind on the leader (B13).

vLLM's scheduler is played here, because with it most of the time would be vLLM's: requests wait, load, run, are
skipped, preempted, aborted and finished as a scheduler does it, and two ranks answer late, badly and twice.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from umbp_core.ops import CHECKSUM_BYTES, Direction, LeaderTransferRequest, OpResult, OpStatus
from umbp_core.ports import Clock
from umbp_core.tiers import Tier
from umbp_vllm.leader import Leader
from umbp_vllm.metadata import StepMetadata, WorkerReport

BLOCK = 4
RANKS = 2
DOCUMENTS = 400
REQUESTS = 100_000
SECOND_LOAD = 4
"""A seed with which a request loads again, and less, what nobody knew to be through with its first load."""


@dataclass(eq=False)
class Played:
    """A request as vLLM has it."""

    request_id: str
    block_hashes: list[bytes]
    num_prompt_tokens: int
    wanted: int
    table: list[int]
    num_tokens: int = 0
    num_computed_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    lora_request: None = None
    priority: int = 0
    status: Any = field(default_factory=lambda: SimpleNamespace(name="WAITING"))

    def get_block_ids(self) -> tuple[list[int]]:
        """As vLLM's own blocks of an allocation."""
        return (self.table,)

    @property
    def blocks(self) -> list[list[Any]]:
        """As vLLM's cache manager gives them."""
        return [[SimpleNamespace(block_id=block) for block in self.table]]


class BlockPool:
    """References, counted."""

    def __init__(self, blocks: int) -> None:
        self.blocks = [SimpleNamespace(block_id=number) for number in range(blocks)]
        self.references: Counter[int] = Counter()

    def touch(self, blocks: Iterable[Any]) -> None:
        self.references.update(block.block_id for block in blocks)

    def free_blocks(self, blocks: Iterable[Any]) -> None:
        self.references.subtract(block.block_id for block in blocks)
        assert min(self.references.values()) >= 0

    def evict_blocks(self, blocks: set[int]) -> None:
        raise AssertionError(f"nothing was computed in vain, and {blocks} are to be forgotten")


class PlayedEngine:
    """The calls of a scheduler and of two ranks, drawn from ``seed``."""

    def __init__(self, leader: Leader, seed: int) -> None:
        self.leader = leader
        self.rng = random.Random(seed)
        self.pool = BlockPool(4096)
        self.alive: dict[str, Played] = {}
        self.waiting: deque[Played] = deque()
        self.loading: dict[str, Played] = {}
        self.loaded: list[Played] = []
        self.running: dict[str, Played] = {}
        self.late: deque[tuple[int, WorkerReport]] = deque()
        self.cancelled: set[str] = set()
        self.waits: dict[str, set[int]] = {}
        self.started = 0
        self.steps = 0
        self.seen: Counter[str] = Counter()
        leader.held.bind(self.pool)
        leader.tables.bind(SimpleNamespace(get_blocks=lambda name: self.alive[name]))

    def arrive(self) -> None:
        document = self.rng.randrange(DOCUMENTS)
        blocks = self.rng.randint(1, 5)
        hashes = [b"%08d%024d" % (document, block) for block in range(blocks)]
        # Blocks that decoding fills are the request's own.
        hashes += [b"%032d" % (self.started * 10 + block) for block in range(3)]
        table = [1 + (self.started * 9 + block) % 4000 for block in range(9)]
        request = Played(f"r{self.started}", hashes, blocks * BLOCK, self.rng.randint(1, 9), table)
        request.num_tokens = request.num_prompt_tokens
        self.started += 1
        self.alive[request.request_id] = request
        self.waiting.append(request)
        self.leader.on_new_request(request)

    def step(self, arrivals: int) -> None:
        """One call of ``schedule`` and the report of its step."""
        for _ in range(arrivals):
            self.arrive()
        self._abort()
        preempted = [request for request in self.running.values() if self.rng.random() < 0.01]
        for request in preempted:
            del self.running[request.request_id]
            request.status.name, request.num_computed_tokens = "PREEMPTED", 0
            self.waiting.append(request)
            self.seen["preempted"] += 1
        scheduled = {name: 1 for name in self.running if self.rng.random() < 0.9}
        self.seen["skipped"] += len(self.running) - len(scheduled)
        joined = [] if preempted else self._admit()
        scheduled |= {request.request_id: request.num_tokens - request.num_computed_tokens for request in joined}
        self.leader.begin_step()
        self.leader.plan_step(self._output(scheduled, joined, {request.request_id for request in preempted}))
        metadata = self.leader.drain()
        self._computed(scheduled)
        self._carry_out(metadata)
        self._report()
        self.steps += 1

    def _admit(self) -> list[Played]:
        joined, self.loaded = self.loaded, []
        for _ in range(min(len(self.waiting), 80)):
            request = self.waiting.popleft()
            answer, is_async = self.leader.match(request, 0)
            if answer is None or self.rng.random() < 0.2:
                self.waiting.append(request)  # another one loads the same, or there is no room
                self.seen["asked again"] += 1
                continue
            external = 0 if self.rng.random() < 0.05 else answer
            self.leader.allocated(request, request, external)
            if external:
                assert is_async
                request.status.name, request.num_computed_tokens = "WAITING_FOR_REMOTE_KVS", external
                self.loading[request.request_id] = request
                self.waits[request.request_id] = set(range(RANKS))
            else:
                joined.append(request)
        for request in joined:
            request.status.name = "RUNNING"
            request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
            self.running[request.request_id] = request
        return joined

    @staticmethod
    def _output(scheduled: dict[str, int], joined: list[Played], preempted: set[str]) -> Any:
        return SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_new_reqs=[SimpleNamespace(req_id=request.request_id) for request in joined],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set()),
            preempted_req_ids=preempted,
            finished_req_ids=set(),
        )

    def _computed(self, scheduled: dict[str, int]) -> None:
        for name, tokens in scheduled.items():
            request = self.running[name]
            request.num_computed_tokens += tokens
            if request.num_computed_tokens == request.num_tokens:
                request.num_tokens += 1
            if request.num_tokens - request.num_prompt_tokens > request.wanted:
                request.status.name = "FINISHED_LENGTH_CAPPED"
                self._end(request, "finished")

    def _abort(self) -> None:
        for request in [request for request in self.alive.values() if self.rng.random() < 0.006]:
            where = request.status.name.lower()
            request.status.name = "FINISHED_ABORTED"
            self._end(request, f"aborted {where}")

    def _end(self, request: Played, how: str) -> None:
        name = request.request_id
        self.leader.finished(request)
        if self.rng.random() < 0.1:
            self.leader.finished(request)  # vLLM may say it twice
        for place in (self.loading, self.running, self.alive):
            place.pop(name, None)
        for queue in (self.waiting, self.loaded):
            if request in queue:
                queue.remove(request)
        self.seen[how] += 1

    def _carry_out(self, metadata: StepMetadata) -> None:
        """Both ranks get the ops; each ends now or some steps later, well or not, and some results come twice."""
        self.cancelled |= set(metadata.cancels)
        for op in metadata.ops:
            for rank in range(RANKS):
                result = self._result(op)
                report = WorkerReport(results={rank: [result, result]})
                self.late.append((self.steps + self.rng.choice((0, 0, 1, 3)), report))
                if result.quarantined:
                    self.late.append((self.steps + 8, WorkerReport(released={rank: [op.op_id]})))

    def _result(self, op: LeaderTransferRequest) -> OpResult:
        status = OpStatus.CANCELLED if op.op_id in self.cancelled else self.rng.choice(OUTCOMES)
        failed = () if status is OpStatus.DONE else tuple(range(len(op.blocks)))
        checksums = bytes(CHECKSUM_BYTES * len(op.blocks)) if op.direction is Direction.STORE else b""
        quarantined = status in (OpStatus.EXPIRED, OpStatus.CANCELLED) and self.rng.random() < 0.5
        self.seen[f"{op.direction.label} {status.value}"] += 1
        return OpResult(
            op.op_id, op.request_id, op.direction, status, failed, checksums, reason="played", quarantined=quarantined
        )

    def _report(self) -> None:
        due = [report for when, report in self.late if when <= self.steps]
        self.late = deque((when, report) for when, report in self.late if when > self.steps)
        self.leader.step_ended(set())
        for report in due:
            self.leader.take_report(report)
            for rank, results in report.results.items():
                for result in results:
                    self._load_ended(rank, result)

    def _load_ended(self, rank: int, result: OpResult) -> None:
        request = self.loading.get(result.request_id)
        if result.direction is not Direction.LOAD or request is None:
            return
        ranks = self.waits[result.request_id]
        ranks.discard(rank)
        if result.status is not OpStatus.DONE:
            request.num_computed_tokens = 0
        if not ranks:
            self.loaded.append(self.loading.pop(result.request_id))


OUTCOMES = [OpStatus.DONE] * 17 + [OpStatus.FAILED, OpStatus.EXPIRED, OpStatus.CANCELLED]


def left_behind(leader: Leader, pool: BlockPool) -> dict[str, int]:
    """Everything that a request may leave on the leader; empty when there is nothing."""
    parts = leader.pool
    assert parts is not None
    dram = parts.directory.stats(Tier.DRAM)
    counts = {
        "slots": len(leader._slots),
        "requests": len(leader._requests),
        "running": len(leader._agenda._running) + len(leader._agenda._absent) + len(leader._agenda._next),
        "tables": len(leader.tables._tables),
        "ops": len(parts.ledger),
        "quarantined": parts.ledger.quarantined,
        "store batches": len(parts.stores._in_flight),
        "loads": len(parts.loads._in_flight) + len(parts.loads._void) + len(parts.loads._filling),
        "matches": parts.loads.staged,
        "waiters": len(parts.loads._loading),
        "held": len(parts.held),
        "references": sum(pool.references.values()),
        "pins": dram.pinned,
        "reservations": dram.reserved,
        "lost pages": dram.total_pages - dram.free_pages - dram.objects,
    }
    return {name: count for name, count in counts.items() if count}


def ticking(seed: int) -> Clock:
    """A clock that goes on by up to 100 us whenever it is asked, the same way each time."""
    rng = random.Random(seed)
    times = itertools.accumulate(rng.random() * 1e-4 for _ in itertools.count())
    return lambda: next(times)


@pytest.mark.slow
@pytest.mark.statement("connector", 26)
@pytest.mark.bug("B13")
@pytest.mark.parametrize(("seed", "requests"), [(26, REQUESTS), (SECOND_LOAD, 20_000)])
def test_nothing_is_left_of_a_hundred_thousand_requests(make_umbp: MakeUmbp, seed: int, requests: int) -> None:
    harness = make_umbp(tp=RANKS)
    leader = Leader(harness.leader.leader._setup, ticking(seed))
    leader.greet(harness.leader.leader._hellos.values())
    engine = PlayedEngine(leader, seed)
    while engine.started < requests:
        engine.step(arrivals=50)
    for _ in range(10_000):
        engine.step(arrivals=0)
        if not (engine.alive or engine.late or leader.has_work):
            break
    assert leader.live_requests == 0
    assert left_behind(leader, engine.pool) == {}
    happened = {name for name, count in engine.seen.items() if count > requests // 2000}
    assert happened >= {
        "finished", "preempted", "skipped", "asked again",
        "aborted waiting", "aborted preempted", "aborted waiting_for_remote_kvs", "aborted running",
        *(f"{direction} {status.value}" for direction in ("load", "store") for status in OpStatus),
    }  # fmt: skip
    assert engine.seen["finished"] > requests / 4
