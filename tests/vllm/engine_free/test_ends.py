"""Finish, abort and preemption in every phase (conformance statements 59-65, 68, 69, 96-100, 102)."""

from __future__ import annotations

import copy
import threading

import pytest
from vllm.v1.request import RequestStatus

from tests.connectors.waiting import PATIENCE
from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction
from umbp_vllm import connector


def free_blocks(engine: UmbpHarness) -> int:
    return engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


@pytest.mark.statement("connector", 65)
@pytest.mark.statement("connector", 64)
@pytest.mark.parametrize("tp", [1, 2])
def test_abort_before_the_load_was_submitted(make_umbp: MakeUmbp, tp: int) -> None:
    """Statements 64, 97: the step that carries the load has not run; the abort is seen first."""
    engine = make_umbp(tp=tp)
    engine.store(tokens(24))
    engine.hold(Direction.LOAD)
    name = engine.add(tokens(24))
    engine.abort_during_step(name)
    engine.step()
    assert engine.scheduler.requests[name].is_finished()
    engine.release(Direction.LOAD)
    engine.drain()
    assert engine.stat("ops", "load", "done") + engine.stat("ops", "load", "cancelled") == 1
    engine.close()


@pytest.mark.statement("connector", 65)
@pytest.mark.statement("connector", 62)
@pytest.mark.statement("connector", 64)
@pytest.mark.statement("connector", 97)
@pytest.mark.parametrize("tp", [1, 2])
def test_abort_while_the_load_writes(make_umbp: MakeUmbp, tp: int) -> None:
    """Statements 64, 65: committed loads run to their end; the blocks are not freed before."""
    engine = make_umbp(tp=tp)
    engine.store(tokens(24))
    engine.hold(Direction.LOAD)
    free = free_blocks(engine)
    name = engine.add(tokens(24))
    engine.step()
    for copier in engine.copiers:
        assert copier.entered[Direction.LOAD].wait(PATIENCE)
    engine.abort(name)
    for _ in range(5):
        engine.step()
    assert free_blocks(engine) == free - 6
    engine.release(Direction.LOAD)
    engine.drain()
    assert free_blocks(engine) == free
    life = engine.ledger.lives[name]
    assert dict(life.recving) == dict.fromkeys(range(tp), 1)
    assert not life.sending
    engine.close()


@pytest.mark.statement("connector", 96)
def test_one_rank_cannot_free_what_another_still_writes(make_umbp: MakeUmbp) -> None:
    """Statement 96: rank 0 is done, rank 1 is not; the request is neither scheduled nor freed."""
    engine = make_umbp(tp=2)
    engine.store(tokens(24))
    engine.copiers[1].hold(Direction.LOAD)
    name = engine.add(tokens(24))
    engine.step_until(lambda: bool(engine.ledger.lives[name].recving[0]))
    for _ in range(20):
        engine.step()
    assert engine.scheduler.requests[name].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    engine.abort(name)
    for _ in range(20):
        engine.step()
    assert name in engine.scheduler.requests
    engine.copiers[1].release(Direction.LOAD)
    engine.drain()
    assert dict(engine.ledger.lives[name].recving) == {0: 1, 1: 1}
    engine.close()


@pytest.mark.statement("connector", 63)
@pytest.mark.bug("B4")
def test_abort_between_arrival_and_scheduling(make_umbp: MakeUmbp) -> None:
    """The load was reported, the request not scheduled yet (bug B4)."""
    engine = make_umbp()
    engine.store(tokens(24))
    name = engine.add(tokens(24))
    engine.step_until(lambda: name in engine.scheduler.finished_recving_kv_req_ids)
    engine.abort(name)
    assert name not in engine.scheduler.requests
    engine.drain()
    assert engine.ledger.lives[name].recving[0] == 1
    engine.close()


@pytest.mark.statement("connector", 63)
@pytest.mark.bug("B4")
def test_abort_of_a_request_that_was_never_scheduled(make_umbp: MakeUmbp) -> None:
    """Statement 63."""
    engine = make_umbp()
    name = engine.add(tokens(24))
    engine.abort(name)
    engine.drain()
    assert engine.ledger.lives[name].finished_calls == 1
    engine.close()


@pytest.mark.statement("connector", 60)
@pytest.mark.statement("connector", 68)
@pytest.mark.bug("B5")
def test_abort_while_blocks_are_being_stored(make_umbp: MakeUmbp) -> None:
    """Statements 60, 61, 68: the request is gone at once, its blocks stay untouched until the store has read them."""
    engine = make_umbp(num_blocks=40, max_model_len=64, max_num_seqs=64)
    engine.hold(Direction.STORE)
    name = engine.add(tokens(24), max_tokens=8)
    engine.step()
    engine.step()
    assert engine.copiers[0].entered[Direction.STORE].wait(PATIENCE)
    engine.abort(name)
    engine.step()
    assert name not in engine.scheduler.requests
    assert len(engine.pool.held)
    # Everything else that the engine has is taken by others meanwhile; none of it may be a block under the store.
    others = [engine.add(tokens(1, first), max_tokens=2) for first in range(100, 140)]
    engine.step()
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    engine.abort(*others)
    engine.release(Direction.STORE)
    engine.drain()
    assert engine.check_stored() >= 6
    assert all(engine.present(tokens(24)))
    engine.close()


@pytest.mark.statement("connector", 60)
@pytest.mark.statement("connector", 61)
@pytest.mark.statement("connector", 62)
def test_a_finished_request_leaves_nothing_to_report(make_umbp: MakeUmbp) -> None:
    """Statements 60-62: nothing is ever handed over, so nothing can be reported as sent."""
    engine = make_umbp()
    engine.hold(Direction.STORE)
    name = engine.add(tokens(24), max_tokens=2)
    engine.run_until_finished(name)
    life = engine.ledger.lives[name]
    assert not life.delayed
    assert name not in engine.scheduler.requests
    engine.release(Direction.STORE)
    engine.drain()
    assert not life.sending
    assert all(engine.present(tokens(24)))
    engine.close()


@pytest.mark.statement("connector", 59)
def test_finishing_twice_and_finishing_strangers(make_umbp: MakeUmbp) -> None:
    """Statement 59: the second call for an id, and a call for an unknown one, change nothing."""
    engine = make_umbp()
    name = engine.add(tokens(24), max_tokens=2)
    engine.step()
    request = engine.scheduler.requests[name]
    blocks = engine.scheduler.kv_cache_manager.get_block_ids(name)
    engine.run_until_finished(name)
    finish = type(engine.leader).request_finished_all_groups
    first = finish(engine.leader, request, blocks)
    assert finish(engine.leader, request, blocks) == first == (False, None)
    stranger = copy.copy(request)
    stranger.request_id = "nobody"
    assert finish(engine.leader, stranger, blocks) == (False, None)
    engine.drain()
    engine.close()


def test_an_id_that_comes_again(make_umbp: MakeUmbp) -> None:
    """A client may reuse an id while stores of its first life are on their way."""
    engine = make_umbp()
    engine.hold(Direction.STORE)
    first = engine.add(tokens(24), max_tokens=1, request_id="same")
    engine.run_until_finished(first)
    engine.step()
    engine.expects_internal_failures = True
    engine.add(tokens(24, 500), max_tokens=6, request_id="same")
    engine.run_until_finished("same")
    engine.release(Direction.STORE)
    engine.drain()
    assert engine.check_stored() >= 6
    engine.close()


@pytest.mark.statement("connector", 69)
@pytest.mark.bug("B10")
def test_preempted_requests_come_back_from_the_pool(make_umbp: MakeUmbp) -> None:
    """Statements 68, 69: blocks under a store are not reused; the next match starts from a clean slot."""
    engine = make_umbp(num_blocks=28, max_model_len=80)
    names = [engine.add(tokens(30, first), max_tokens=30) for first in (0, 200, 400)]
    engine.drain()
    assert engine.stat("ops", "load", "done") > 0
    assert any(len(engine.ledger.lives[name].matches) > 1 for name in names)
    engine.check_stored()
    engine.close()


@pytest.mark.statement("connector", 100)
def test_a_request_that_must_wait_for_blocks_under_a_store(make_umbp: MakeUmbp) -> None:
    """Statement 100: while stores hold blocks the engine waits instead of preempting, and not for ever."""
    engine = make_umbp(num_blocks=20, max_model_len=64)
    engine.hold(Direction.STORE)
    first = engine.add(tokens(40), max_tokens=1)
    engine.run_until_finished(first)
    second = engine.add(tokens(44, 200), max_tokens=2)
    for _ in range(10):
        engine.step()
    assert engine.leader.has_pending_block_frees()
    assert not engine.tokens[second]
    engine.release(Direction.STORE)
    engine.drain()
    assert not engine.leader.has_pending_block_frees()
    assert engine.scheduler.requests == {}
    engine.close()


@pytest.mark.statement("connector", 99)
def test_an_idle_engine_still_takes_results(make_umbp: MakeUmbp) -> None:
    """Statement 99: after the last request only steps without tokens are left, and they drain everything."""
    engine = make_umbp()
    engine.hold(Direction.STORE)
    name = engine.add(tokens(24), max_tokens=1)
    engine.run_until_finished(name)
    assert engine.leader.has_pending_push_work()
    for _ in range(3):
        assert not engine.step()
    engine.release(Direction.STORE)
    engine.drain()
    assert not engine.leader.has_pending_push_work()
    assert all(engine.present(tokens(24)))
    engine.close()


def test_an_engine_without_work_sleeps(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    assert not engine.leader.has_pending_push_work()
    engine.store(tokens(24))
    assert not engine.leader.has_pending_push_work()
    assert not engine.scheduler.has_requests()
    engine.close()


@pytest.mark.parametrize("v2_runner", [False, True])
def test_a_busy_step_never_waits_for_a_load(make_umbp: MakeUmbp, v2_runner: bool) -> None:
    """Law L5: the short wait for a load is for steps without tokens, whichever runner asks."""
    engine = make_umbp(v2_runner=v2_runner)
    engine.store(tokens(24))
    running = engine.add(tokens(10, 500), max_tokens=40)
    while not engine.tokens[running]:
        engine.step()
    waits: list[float] = []
    transfer = engine.workers[0].engine
    original = transfer.wait
    transfer.wait = lambda ids, timeout, first=False: (waits.append(timeout), original(ids, timeout, first))[1]
    engine.hold(Direction.LOAD)
    loading = engine.add(tokens(24))
    for _ in range(10):
        assert engine.step()
    assert engine.scheduler.requests[loading].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert waits == []
    engine.release(Direction.LOAD)
    engine.drain()
    engine.close()


@pytest.mark.statement("connector", 13)
def test_a_prefix_is_loaded_once_for_many(make_umbp: MakeUmbp) -> None:
    """Parallel requests (and ``n>1``) with a shared prefix: one load, no convoy behind each other's."""
    engine = make_umbp()
    engine.store(tokens(48))
    names = [engine.add(tokens(48) + [900 + index], max_tokens=4) for index in range(6)]
    engine.drain()
    assert engine.stat("ops", "load", "done") == 1
    assert sum(engine.external_tokens(name) for name in names) == 48
    engine.close()


@pytest.mark.statement("connector", 13)
def test_waiting_for_another_ones_load_has_an_end(make_umbp: MakeUmbp) -> None:
    """The load that others wait for hangs: they load or recompute for themselves in bounded time."""
    engine = make_umbp({"share_load_timeout_ms": 30})
    engine.store(tokens(48))
    engine.hold(Direction.LOAD)
    first = engine.add(tokens(48), max_tokens=1)
    engine.step()
    second = engine.add(tokens(48) + [7], max_tokens=1)
    engine.step()
    assert engine.ledger.lives[second].matches[-1][1] is None
    engine.step_until(lambda: bool(engine.ledger.lives[second].loads))
    engine.release(Direction.LOAD)
    engine.drain()
    assert engine.external_tokens(first) == engine.external_tokens(second) == 48
    engine.close()


def test_the_one_that_others_wait_for_is_aborted(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    engine.store(tokens(48))
    engine.hold(Direction.LOAD)
    first = engine.add(tokens(48), max_tokens=1)
    engine.step()
    second = engine.add(tokens(48) + [7], max_tokens=1)
    engine.step()
    engine.abort(first)
    engine.release(Direction.LOAD)
    engine.drain()
    assert engine.finish_reasons[second] == "length"
    engine.close()


@pytest.mark.statement("connector", 102)
def test_nothing_needs_delivery(make_umbp: MakeUmbp) -> None:
    """Statement 102."""
    engine = make_umbp()
    assert engine.leader.requires_kv_delivery is False
    assert engine.scheduler.requires_kv_delivery is False
    engine.close()


@pytest.mark.statement("connector", 23)
@pytest.mark.bug("B11")
def test_decoded_blocks_are_stored_too(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    name = engine.add(tokens(6), max_tokens=21)
    engine.drain()
    said = tokens(6) + engine.tokens[name]
    assert engine.present(said[:26]) == [True] * 6
    assert engine.check_stored() == 6
    engine.close()


@pytest.mark.statement("connector", 19)
def test_what_the_pool_holds_is_not_copied_again(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    engine.store(tokens(40))
    gathers = engine.copiers[0].calls[Direction.STORE]
    again = engine.add(tokens(40), max_tokens=1, skip_reading=True)
    engine.drain()
    assert engine.external_tokens(again) == 0
    assert engine.copiers[0].calls[Direction.STORE] == gathers
    engine.close()


@pytest.mark.statement("connector", 72)
def test_shutdown_with_transfers_under_way(make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement 72: ends within its bound although a copy hangs."""
    monkeypatch.setattr(connector, "CLOSE_TIMEOUT_S", 0.4)
    engine = make_umbp()
    engine.store(tokens(24))
    engine.hold(Direction.STORE)
    engine.add(tokens(40, 100), max_tokens=4)
    for _ in range(4):
        engine.step()
    closing = threading.Thread(target=shut_down, args=(engine,))
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive()


def shut_down(engine: UmbpHarness) -> None:
    """As a process does that is told to go: nothing is drained, no gate is opened."""
    for rank in engine.ranks:
        rank.close()
    engine.scheduler.shutdown()
