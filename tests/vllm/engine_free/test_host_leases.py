"""Loads whose time ends while a rank looks at it: every one is reported, well or not, exactly once."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.vllm.harness.played import NoDevice, PlayedEngine
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, NewWorkerSlot, OpResult, OpStatus
from umbp_core.scheduler import Limits
from umbp_core.testing.fakes import FakeClock
from umbp_vllm.host_rank import LEASE, RankHost
from umbp_vllm.layer_gate import LayerGate
from umbp_vllm.load_outcome import LoadOutcome
from umbp_vllm.metadata import PROTOCOL_VERSION, RankHello, StepMetadata
from umbp_vllm.rank_kit import RankKit
from umbp_vllm.worker import Worker

LOOKS = 4
"""More than a load is worth."""


def ticking() -> Callable[[], float]:
    """A clock on which a second passes between any two looks."""
    clock = FakeClock()

    def look() -> float:
        clock.advance(1.0)
        return clock()

    return look


def no_daemon(*_: object) -> RankKit:
    raise AssertionError("nothing is mapped here")


def rank_with(clock: Callable[[], float]) -> Worker:
    """A rank whose transfers are played."""
    engine = PlayedEngine(FakeClock(), random.Random(5), 0.0, 0.0, Limits())
    gate = LayerGate(engine, {}, engine.clock)  # type: ignore[arg-type]
    hello = RankHello(PROTOCOL_VERSION, 0, 0, b"", b"", 1, 1, 1, 1, (1,))
    kit = RankKit(b"", engine, NoDevice(), gate)  # type: ignore[arg-type]
    return Worker(hello, kit, writes=True, host=RankHost(no_daemon, no_daemon, 4096, clock))  # type: ignore[arg-type]


@pytest.mark.statement("connector", 47)
@pytest.mark.parametrize("seconds", [look + 0.5 for look in range(LOOKS)])
def test_a_load_whose_time_ends_between_two_looks_is_reported(seconds: float) -> None:
    """Refused, or begun and then too late, or in time; never neither refused nor begun."""
    clock = ticking()
    worker = rank_with(clock)
    load = LeaderTransferRequest("op", "request", Direction.LOAD, (BlockCopy(b"k", 0, 1, 1),))
    slot = NewWorkerSlot("request", ("op",))
    worker.step(StepMetadata(1, ops=[load], new_slots=[slot], until={"op": clock() + seconds}))
    outcome = worker.poll(idle=False)
    for _ in range(50):
        if outcome.ended:
            break
        outcome = worker.poll(idle=True)
    assert outcome.ended == {"request"}
    report = worker.take_report()
    assert report is not None
    (result,) = report.results[0]
    in_time = result.status is OpStatus.DONE
    assert in_time or (result.reason, result.quarantined) == (LEASE, False)
    assert in_time if seconds > LOOKS - 1 else not in_time or seconds > 1
    assert bool(outcome.failed) != in_time


@pytest.mark.parametrize(("late", "reason"), [(False, "verify"), (True, LEASE)])
def test_what_arrived_of_a_load_counts_within_its_time_only(late: bool, reason: str) -> None:
    """A block that does not verify does not vouch for the others, whose pages may have been given away as well."""
    clock = FakeClock()
    host = RankHost(no_daemon, no_daemon, 4096, clock)  # type: ignore[arg-type]
    blocks = tuple(BlockCopy(b"%d" % number, 0, number, number) for number in range(4))
    load = LeaderTransferRequest("op", "request", Direction.LOAD, blocks)
    assert not host.refused(StepMetadata(1, ops=[load], until={"op": clock() + 20}), [load])
    clock.advance(30 if late else 10)
    result = host.judged(OpResult("op", "request", Direction.LOAD, OpStatus.FAILED, failed=(3,), reason="verify"))
    assert (result.status, result.reason) == (OpStatus.FAILED, reason)
    outcome = LoadOutcome()
    outcome.add(load, result)
    assert sorted(outcome.bad_blocks) == ([0, 1, 2, 3] if late else [3])
