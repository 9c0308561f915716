"""vLLM's prefix cache is reset while requests run and stores read HBM (law L3)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connectors.waiting import PATIENCE
from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.rank import SimulatedRank
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction
from umbp_vllm import compat
from umbp_vllm import worker as worker_module


@pytest.mark.parametrize("v2_runner", [False, True])
def test_preemption_by_reset_while_stores_are_held(make_umbp: MakeUmbp, v2_runner: bool) -> None:
    """A reset that preempts: the request resumes in the same step, in either runner's convention."""
    engine = make_umbp(v2_runner=v2_runner)
    name = engine.add(tokens(24), max_tokens=20)
    while len(engine.tokens[name]) < 9:
        engine.step()
    while len(engine.pool.held):  # without a step more than needed: the request must still be running
        for worker in engine.workers:
            assert worker.engine.wait([str(op["op_id"]) for op in worker.engine.dump()], PATIENCE)
        engine.step()
    if not engine.reset_prefix_cache(running=True):
        raise AssertionError("nothing was held, so the reset must succeed")
    engine.drain()
    assert len(engine.ledger.lives[name].loads) == 1
    engine.check_stored()
    engine.close()


def opened_by_the_fence(engine: UmbpHarness, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Let held stores go on exactly when a worker waits for them; for whom each wait was."""
    fences: list[set[str]] = []
    for worker in engine.workers:
        original = worker.engine.wait

        def wait(op_ids: Any, timeout: float, first: bool = False, original: Any = original) -> bool:
            if not first:
                fences.append(set(op_ids))
                engine.release(Direction.STORE)
            return bool(original(op_ids, timeout, first))

        monkeypatch.setattr(worker.engine, "wait", wait)
    return fences


def begin_stores(engine: UmbpHarness) -> None:
    """Step until every rank stores, and hardly further: the request must still be running.

    vLLM resets nothing while its own step reads the blocks.
    """

    def began() -> bool:
        return all(copier.entered[Direction.STORE].wait(0.3) for copier in engine.copiers)

    engine.step_until(lambda: began() and not engine.is_computing)


@pytest.mark.parametrize("spec", [{}, {"v2_runner": True}, {"tp": 2}, {"pp": 2}], ids=["v1", "v2", "tp2", "pp2"])
@pytest.mark.parametrize("running", [False, True])
def test_a_reset_that_comes_while_a_store_reads_blocks(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], running: bool
) -> None:
    """The blocks are free at once; the next step writes none of them before the store has read them (law L3)."""
    engine = make_umbp(num_blocks=16, max_model_len=60, **spec)
    engine.fences_wait = True  # for what the test itself lets go on
    engine.hold(Direction.STORE)
    name = engine.add(tokens(24), max_tokens=12)
    begin_stores(engine)
    if not running:
        engine.abort(name)
    fences = opened_by_the_fence(engine, monkeypatch)
    held = set(engine.pool.held._held)
    assert held
    assert engine.reset_prefix_cache(running=running)
    assert not len(engine.pool.held)
    other = engine.add(tokens(50, 500), max_tokens=2)
    engine.run_until_finished(other)
    assert fences == [held] * len(engine.workers)
    engine.drain()
    assert all(engine.present(tokens(24)))
    assert engine.check_stored() >= 6
    engine.close()


@pytest.mark.parametrize("running", [False, True])
def test_a_store_whose_blocks_are_cleared_before_the_fence_is_void(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    """Runner V2 with KV of several dtypes: a step clears its blocks before anybody is told to wait for the store."""
    monkeypatch.setattr(SimulatedRank, "clears_early", True)
    monkeypatch.setattr(compat, "clears_before_fences", lambda *_: True)
    engine = make_umbp(num_blocks=16, max_model_len=60, v2_runner=True)
    engine.fences_wait = True
    engine.hold(Direction.STORE)
    name = engine.add(tokens(24), max_tokens=12)
    begin_stores(engine)
    if not running:
        engine.abort(name)
    opened_by_the_fence(engine, monkeypatch)
    assert engine.reset_prefix_cache(running=running)
    other = engine.add(tokens(50, 500), max_tokens=2)
    engine.run_until_finished(other)
    assert engine.stat("failed_blocks", "store", "fence") > 0
    engine.drain()
    engine.check_stored()
    engine.close()


def test_a_store_that_outlasts_the_fence_is_void(make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy hangs while its blocks are reused: whatever it reads is never published (law L1)."""
    monkeypatch.setattr(worker_module, "FENCE_S", 0.05)
    engine = make_umbp(num_blocks=16, max_model_len=60)
    engine.fences_wait = True
    engine.hold(Direction.STORE)
    engine.run_until_finished(engine.add(tokens(24), max_tokens=1))
    engine.step_until(engine.copiers[0].entered[Direction.STORE].is_set)
    assert engine.reset_prefix_cache()
    other = engine.add(tokens(50, 500), max_tokens=2)
    engine.run_until_finished(other)
    engine.release(Direction.STORE)
    engine.drain()
    assert not any(engine.present(tokens(24)))
    assert engine.stat("failed_blocks", "store", "fence") == 6
    engine.check_stored()
    engine.close()
