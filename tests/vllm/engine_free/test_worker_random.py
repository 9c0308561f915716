"""Questions, answers, results and releases cross each other in any order; transfers go on between any two calls."""

from __future__ import annotations

import logging

import pytest

from tests.vllm.harness.played import Story
from umbp_connectors.leader import ledger
from umbp_connectors.transfer.failures import LOST
from umbp_core.ops import Direction, OpStatus
from umbp_vllm import worker

NEVER = 1e9
STEPS = 60


@pytest.fixture(autouse=True)
def _impatient_and_quiet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Some stores outlast a fence; thousands of errors are played."""
    monkeypatch.setattr(worker, "FENCE_S", 0.5)
    caplog.set_level(logging.CRITICAL, "vllm.umbp")


def told(story: Story) -> Story:
    """The story to its end."""
    for _ in range(STEPS):
        story.step()
    story.settle()
    return story


def check_memory(story: Story) -> None:
    assert story.free == story.verdicts.keys() == story.sent.keys(), "what ended has given everything back"


def check_loads(story: Story) -> None:
    """Every request that waits hears of its load once on every rank, and well only if it was there."""
    waiting = {op.request_id for op in story.sent.values() if op.direction is Direction.LOAD and not op.layerwise}
    for rank in story.workers:
        assert set(rank.reported) == waiting
        assert set(rank.reported.values()) <= {1}
        for op in story.sent.values():
            if op.direction is Direction.LOAD:
                end = rank.engine.truth.get(op.op_id)  # none where it never came so far
                bad = end is None or end.status is not OpStatus.DONE
                blocks = {block.hbm_block for block in op.blocks}
                assert bool(rank.void & blocks if op.layerwise else op.request_id in rank.failed) or not bad
                assert bad or op.layerwise or op.request_id not in rank.failed, op


def check_stores(story: Story) -> None:
    """What is published was read on every rank before anything wrote over it."""
    for op_id, verdict in story.verdicts.items():
        if verdict.status is OpStatus.DONE:
            for rank in story.workers:
                assert rank.engine.truth[op_id].status is OpStatus.DONE
                assert op_id not in rank.engine.torn


def check_nothing_left(story: Story) -> None:
    for rank in story.workers:
        left = (rank.worker._loads, rank.worker.gate._late, rank.worker._slots._open, rank.engine.quarantined())
        assert not any(map(len, left)), left


def check_but_for_ends(story: Story) -> None:
    check_memory(story)
    check_loads(story)
    check_stores(story)
    check_nothing_left(story)


def check_ends(story: Story) -> None:
    """The leader knows of every op what its rank knew."""
    for op_id, op in story.sent.items():
        assert LOST not in story.verdicts[op_id].reasons, op_id
        for number, status in story.statuses[op_id].items():
            engine = story.workers[number].engine
            made_up = op.layerwise or op_id in engine.torn
            assert status is engine.truth[op_id].status or made_up, op_id


@pytest.mark.statement("connector", 47)
@pytest.mark.statement("connector", 46)
@pytest.mark.parametrize("heartbeat", [0.0, 0.3, NEVER])
@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("fifty", range(2))
def test_no_question_changes_an_end(monkeypatch: pytest.MonkeyPatch, heartbeat: float, lag: int, fifty: int) -> None:
    """Also where nobody ever asks, which then must not be needed."""
    monkeypatch.setattr(ledger, "HEARTBEAT_S", heartbeat)
    for seed in range(50 * fifty, 50 * (fifty + 1)):
        story = told(Story(seed, lag=lag))
        check_but_for_ends(story)
        check_ends(story)


@pytest.mark.statement("connector", 47)
@pytest.mark.bug("B9")
@pytest.mark.parametrize("heartbeat", [0.0, 0.5])
@pytest.mark.parametrize("lag", [0, 2])
def test_lost_steps_beside_questions(monkeypatch: pytest.MonkeyPatch, heartbeat: float, lag: int) -> None:
    monkeypatch.setattr(ledger, "HEARTBEAT_S", heartbeat)
    for seed in range(50):
        check_but_for_ends(told(Story(seed, lag=lag, loss=0.1)))


@pytest.mark.statement("connector", "58b")
@pytest.mark.parametrize("heartbeat", [0.0, 0.5])
@pytest.mark.parametrize("lag", [0, 2])
def test_ops_that_cannot_be_submitted_beside_questions(
    monkeypatch: pytest.MonkeyPatch, heartbeat: float, lag: int
) -> None:
    """Those before them in the same step go on, and nobody waits for the others."""
    monkeypatch.setattr(ledger, "HEARTBEAT_S", heartbeat)
    for seed in range(50):
        check_but_for_ends(told(Story(seed, lag=lag, broken=0.1)))


@pytest.mark.statement("connector", 62)
def test_a_load_is_reported_once_even_if_its_engine_forgot_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question about it may come late."""
    monkeypatch.setattr(ledger, "HEARTBEAT_S", 0.0)
    for seed in range(50):
        story = told(Story(seed, lag=3, remember=6))
        check_loads(story)
        check_nothing_left(story)
