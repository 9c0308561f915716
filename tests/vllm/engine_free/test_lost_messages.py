"""Every message between the leader and a rank is lost, comes twice or comes late (statements 47 and 28, bug B9).

Each run must end: every request with the tokens of a run without a cache, the engine idle, nothing left behind.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import Traffic, tokens
from tests.vllm.harness.umbp import UmbpHarness
from tests.vllm.harness.wires import Fault, Judge, Message, put_wires
from umbp_connectors.leader import ledger
from umbp_connectors.transfer.failures import LOST
from umbp_core.ops import Direction

FAULTS = (Fault.DROP, Fault.DUPLICATE, Fault.DELAY)
NONE = Fault.NONE
EXTRA = {"load_timeout_s": 60.0, "store_timeout_s": 60.0, "log_level": "error"}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "HEARTBEAT_S", 0.02)


def story(engine: UmbpHarness, judge: Judge) -> list[Message]:
    """Stores, a load of everything, one that is aborted, and stores of what is decoded."""
    engine.pace()
    seen = put_wires(engine, judge)
    engine.store(tokens(24))
    engine.add(tokens(26), max_tokens=6)
    engine.add(tokens(12, 300), max_tokens=2)
    gone = engine.add(tokens(25), max_tokens=6)
    engine.step()
    engine.abort_during_step(gone)
    engine.drain()
    for name, reason in engine.finish_reasons.items():
        assert reason == ("abort" if name == gone else "length")
    engine.check_stored()
    return seen


def one_after_the_other(engine_of: MakeUmbp) -> list[Message]:
    """The messages of a run in which nothing happens to any."""
    engine = engine_of(EXTRA, tp=2)
    seen = story(engine, lambda _: Fault.NONE)
    engine.close()
    return seen


@pytest.mark.statement("connector", 47)
@pytest.mark.bug("B9")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["step", "report"])
def test_no_message_is_missed_for_ever(make_umbp: MakeUmbp, kind: str, rank: int, fault: Fault) -> None:
    """Each message of the story in turn."""
    victims = [message for message in one_after_the_other(make_umbp) if (message.kind, message.rank) == (kind, rank)]
    assert len(victims) > 3
    for victim in victims:
        engine = make_umbp(EXTRA, tp=2)
        seen = story(
            engine, lambda m, v=victim: fault if (m.kind, m.rank, m.number) == (kind, rank, v.number) else NONE
        )
        assert len(seen) >= len(victims), victim
        engine.close()


@pytest.mark.statement("connector", 28)
@pytest.mark.parametrize("fault", [Fault.DROP, Fault.DELAY])
def test_a_step_that_a_worker_missed_is_told_and_never_carried_out(make_umbp: MakeUmbp, fault: Fault) -> None:
    """The leader hears of it at once, not by a deadline: the store of step 1 is given up on all ranks."""
    engine = make_umbp({**EXTRA, "store_timeout_s": 1000.0}, tp=2)
    put_wires(engine, lambda m: fault if (m.kind, m.rank, m.number) == ("step", 1, 1) else NONE)
    engine.add(tokens(24), max_tokens=4)
    engine.drain()
    assert engine.stat("degraded", "lost_step") == 1
    assert engine.stat("failed_blocks", "store", "lost") == 6
    assert not any(engine.present(tokens(24)))
    engine.close()


@pytest.mark.statement("connector", 47)
@pytest.mark.parametrize("spec", [{}, {"tp": 2}, {"async_scheduling": True}], ids=lambda spec: str(spec))
def test_a_question_never_overtakes_the_answer(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]
) -> None:
    """Asked about every op with every step, as after a very long one, the ranks lose none that ended well."""
    monkeypatch.setattr(ledger, "HEARTBEAT_S", 0.0)
    engine = make_umbp(EXTRA, **spec)
    engine.pace()
    for first in (0, 300):
        engine.store(tokens(24, first))
        assert all(engine.present(tokens(24, first)))
    loaded = engine.add(tokens(26), max_tokens=6)
    engine.drain()
    assert [engine.stat("failed_blocks", way, "lost") for way in ("store", "load")] == [0, 0]
    assert engine.finish_reasons[loaded] == "length"
    assert sum(copier.calls[Direction.LOAD] for copier in engine.copiers) == len(engine.copiers)
    engine.close()


@pytest.mark.statement("connector", 47)
@pytest.mark.parametrize(
    ("spec", "extra"),
    [
        ({"tp": 2}, {}),
        ({"tp": 2, "async_scheduling": True}, {}),
        ({"async_scheduling": True}, {"load_mode": "layerwise", "store_granularity": "layer"}),
        ({"v2_runner": True}, {"load_mode": "layerwise"}),
    ],
    ids=str,
)
def test_random_traffic_in_which_everything_is_asked_about(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: dict[str, Any], extra: dict[str, Any]
) -> None:
    """With every step about every op, with SSD behind: where no message is lost nothing fails."""
    monkeypatch.setattr(ledger, "HEARTBEAT_S", 0.0)
    patient = {"load_timeout_s": 60.0, "store_timeout_s": 60.0, "log_level": "error"}
    disk = {"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}
    engine = make_umbp({**patient, **disk, **extra}, num_blocks=96, max_model_len=96, **spec)
    Traffic(engine, random.Random(7)).run(steps=100)
    for way in ("load", "store", "demote"):
        for reason in (LOST, ledger.RANK_LOST, "internal", "not_started"):
            assert engine.stat("failed_blocks", way, reason) == 0, (way, reason)
    assert engine.stat("stored_blocks", "dram") > 0
    engine.check_stored()
    engine.close()


def test_a_hello_that_is_lost_is_asked_for_again(make_umbp: MakeUmbp) -> None:
    engine = make_umbp({**EXTRA, "lookup_timeout_ms": 20}, tp=2, shake_hands=False)
    lost = itertools.count()
    put_wires(engine, lambda m: Fault.DROP if m.kind == "report" and m.rank and next(lost) < 3 else NONE)
    engine.add(tokens(24), max_tokens=6)
    engine.drain()
    assert engine.finish_reasons == {"r1": "length"}
    assert next(lost) > 3
    engine.store(tokens(24, 300))
    assert all(engine.present(tokens(24, 300)))
    engine.close()


@pytest.mark.statement("connector", 49)
def test_a_rank_that_says_nothing_any_more_is_given_up_and_the_engine_goes_on(make_umbp: MakeUmbp) -> None:
    engine = make_umbp({**EXTRA, "store_timeout_s": 1000.0}, tp=2)
    put_wires(engine, lambda m: Fault.DROP if m.kind == "report" and m.rank == 1 else NONE)
    engine.add(tokens(24), max_tokens=4)
    engine.step_until(lambda: engine.stat("degraded", "rank_lost") == 1)
    engine.drain()
    assert engine.pool.ledger.lost == {1}
    assert engine.stat("failed_blocks", "store", "rank_lost") >= 6
    assert not any(engine.present(tokens(24)))
    stores = engine.copiers[0].calls[Direction.STORE]
    later = engine.add(tokens(24, 300), max_tokens=4)
    engine.drain()
    assert (engine.finish_reasons[later], engine.copiers[0].calls[Direction.STORE]) == ("length", stores)


@pytest.mark.statement("connector", 49)
def test_requests_that_need_all_of_hbm_end_although_a_lost_rank_keeps_some_of_it(make_umbp: MakeUmbp) -> None:
    """What is held for its stores never comes free: vLLM must not wait for it, but preempt."""
    engine = make_umbp({**EXTRA, "store_timeout_s": 1000.0}, tp=2, num_blocks=24, max_model_len=64)
    put_wires(engine, lambda m: Fault.DROP if m.kind == "report" and m.rank == 1 else NONE)
    engine.add(tokens(8), max_tokens=2)
    engine.step_until(lambda: engine.stat("degraded", "rank_lost") == 1)
    engine.drain()
    assert len(engine.pool.held) > 0
    names = [engine.add(tokens(12, 100 * number), max_tokens=24) for number in range(1, 5)]
    engine.run_until_finished()
    assert {engine.finish_reasons[name] for name in names} == {"length"}


@pytest.mark.statement("connector", 49)
def test_a_rank_is_lost_while_requests_fill_hbm(make_umbp: MakeUmbp) -> None:
    """Some of their stores begin in the very step in which it is given up; the engine comes to rest all the same."""
    engine = make_umbp({**EXTRA, "store_timeout_s": 1000.0}, tp=2, num_blocks=160, max_model_len=64)
    put_wires(engine, lambda m: Fault.DROP if m.kind == "report" and m.rank == 1 else NONE)

    fresh = itertools.count(1)

    def is_lost() -> bool:
        if not engine.scheduler.requests:
            for more in range(4):  # so that one of them fills a block in every step
                engine.add([next(fresh), *range(500, 503 + more)], max_tokens=40)
        return engine.stat("degraded", "rank_lost") == 1

    engine.step_until(is_lost)
    names = [engine.add(tokens(12, 100 * number), max_tokens=48) for number in range(4, 20)]
    engine.drain()
    assert {engine.finish_reasons[name] for name in names} == {"length"}


@pytest.mark.statement("connector", 47)
@pytest.mark.parametrize(
    "spec",
    [{"tp": 2}, {"tp": 4}, {"pp": 2}, {"async_scheduling": True, "tp": 2}, {"v2_runner": True}],
    ids=lambda spec: str(spec),
)
@pytest.mark.parametrize("seed", range(2))
def test_random_faults_in_random_traffic(make_umbp: MakeUmbp, tmp_path: Path, spec: dict[str, Any], seed: int) -> None:
    """One message in seven is lost, comes twice or late, both ways, at every rank, with SSD behind."""
    rng = random.Random(seed)
    extra = {**EXTRA, "ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}
    engine = make_umbp(extra, num_blocks=96, max_model_len=96, **spec)
    faults = random.Random(seed + 1000)
    hit: list[Message] = []

    def judge(message: Message) -> Fault:
        if faults.random() > 1 / 7:
            return NONE
        hit.append(message)
        return faults.choice(FAULTS)

    put_wires(engine, judge)
    traffic = Traffic(engine, rng)
    traffic.run(steps=120)
    assert len(hit) > 10
    faults.seed(None)
    engine.check_stored()
    engine.close()
