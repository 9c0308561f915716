"""Loads and stores that fail, objects that rot, folders that are in use (conformance statements 50-58)."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.waiting import PATIENCE
from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_connectors.pool import folder
from umbp_connectors.pool.slab import SlabFile
from umbp_core.ops import Direction
from umbp_core.tiers import Tier

HYBRID = (GroupSpec("full"), GroupSpec("window", window=10))
SSD = {"ssd_capacity": "4MiB"}


@pytest.mark.statement("connector", 52)
@pytest.mark.statement("connector", 54)
@pytest.mark.parametrize("block", range(6))
@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD])
def test_a_flipped_bit_is_a_miss(make_umbp: MakeUmbp, tmp_path: Path, block: int, tier: Tier) -> None:
    """Statements 51, 52, 54 and law L1, at every block index, with the other rank's copies intact."""
    engine = make_umbp({**SSD, "ssd_dir": str(tmp_path)}, tp=2)
    engine.store(tokens(24))
    keys = engine.keys(tokens(24))[0]
    if tier is Tier.SSD:
        engine.drop_from(Tier.DRAM)
    engine.corrupt(1, keys[block], tier)
    again = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[again] == "length"
    assert engine.stat("failed_blocks", "load", "verify") == 1
    assert engine.stat("ops", "load", "failed") == 1
    # The bad copy is gone, and the block that was computed again is back.
    engine.check_stored()
    assert all(engine.present(tokens(24)))
    engine.close()


@pytest.mark.parametrize("block", range(6))
def test_a_flipped_bit_in_a_model_of_several_groups(make_umbp: MakeUmbp, block: int) -> None:
    """Statement 51: with several KV groups the request is named, never a block."""
    engine = make_umbp(groups=HYBRID, tp=2)
    engine.store(tokens(24))
    engine.corrupt(0, engine.keys(tokens(24))[0][block])
    again = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[again] == "length"
    assert engine.stat("ops", "load", "failed") == 1
    engine.check_stored()
    engine.close()


@pytest.mark.parametrize(
    ("kind", "block"), [*(("window", block) for block in range(6, 10)), ("chunk", 8), ("chunk", 9)]
)
def test_a_flipped_bit_in_a_model_of_windows_alone(make_umbp: MakeUmbp, kind: str, block: int) -> None:
    """Of a window only the last blocks are loaded: what comes before a bad one is not there to go on from."""
    engine = make_umbp(groups=(GroupSpec(kind, window=16),))
    engine.store(tokens(40))
    engine.corrupt(0, engine.keys(tokens(40))[0][block])
    again = engine.add(tokens(42), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[again] == "length"
    engine.check_stored()
    engine.close()


def test_the_user_may_want_the_request_to_fail(make_umbp: MakeUmbp) -> None:
    engine = make_umbp({"load_failure_policy": "fail"})
    engine.store(tokens(24))
    engine.corrupt(0, engine.keys(tokens(24))[0][2])
    again = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[again] == "error"
    engine.close()


@pytest.mark.statement("connector", 51)
@pytest.mark.bug("B7")
@pytest.mark.parametrize("groups", [(GroupSpec(),), HYBRID], ids=["one group", "several groups"])
def test_a_copy_into_hbm_that_fails(make_umbp: MakeUmbp, groups: tuple[GroupSpec, ...]) -> None:
    engine = make_umbp(groups=groups, tp=2)
    engine.store(tokens(24))
    engine.copiers[1].fails.add(Direction.LOAD)
    again = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[again] == "length"
    engine.copiers[1].fails.clear()
    engine.reset_prefix_cache()
    once_more = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.external_tokens(once_more) == 24
    engine.close()


@pytest.mark.statement("connector", 46)
@pytest.mark.bug("B7")
def test_a_load_that_hangs_is_recomputed_in_time(make_umbp: MakeUmbp) -> None:
    """Law L4: the deadline, not the copy, ends the wait; a late copy touches no block of anybody else."""
    engine = make_umbp(num_blocks=80, max_model_len=64)
    (copier,) = engine.copiers
    prompts = [tokens(24, 100 * number) for number in range(engine.workers[0].engine._tools.hash_threads + 1)]
    for prompt in prompts:
        engine.store(prompt)
    copier.hold(Direction.LOAD)
    # Every thread that loads is in a copy that hangs, so the last load expires before it begins to write.
    blockers = [engine.add(prompt, max_tokens=1) for prompt in prompts[:-1]]
    engine.step_until(lambda: copier.calls[Direction.LOAD] == len(blockers))
    engine.abort(*blockers)
    again = engine.add([*prompts[-1], 900, 901], max_tokens=3)
    engine.step()
    engine.pass_time(3600)
    engine.run_until_finished(again)
    assert engine.finish_reasons[again] == "length"
    assert engine.stat("ops", "load", "expired") == 1
    engine.release(Direction.LOAD)
    engine.drain()
    engine.close()


@pytest.mark.statement("connector", 46)
def test_an_engine_stays_awake_until_a_given_up_op_has_let_go(make_umbp: MakeUmbp) -> None:
    """The second store expires in the queue behind the first: its blocks come back only with a step after that."""
    engine = make_umbp()
    engine.hold(Direction.STORE)
    engine.add(tokens(24), max_tokens=1)
    engine.step_until(engine.copiers[0].entered[Direction.STORE].is_set)
    engine.add(tokens(24, 300), max_tokens=1)
    engine.step()
    engine.pass_time(3600)
    engine.step_until(lambda: engine.stat("ops", "store", "expired") >= 1)
    transfer = engine.workers[0].engine
    take_released = transfer.take_released
    late: list[str] = []
    transfer.take_released = lambda: late.extend(take_released()) or []
    engine.release(Direction.STORE)
    engine.step_until(lambda: bool(late) and not len(engine.pool.ledger))
    assert engine.leader.has_pending_push_work()
    transfer.take_released = lambda: [late.pop()] if late else take_released()
    engine.drain()
    assert engine.reset_prefix_cache()
    engine.close()


def test_a_disk_that_hangs_keeps_no_idle_engine_awake(
    make_umbp: MakeUmbp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was given is overdue then; when the disk answers at last, that counts with the next step there is."""
    engine = make_umbp({"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"})
    entered, gate = threading.Event(), threading.Event()
    write = SlabFile.write_from

    def hang(slab: SlabFile, slot: int, view: memoryview) -> None:
        entered.set()
        assert gate.wait(60)
        write(slab, slot, view)

    monkeypatch.setattr(SlabFile, "write_from", hang)
    engine.add(tokens(24), max_tokens=1)
    engine.step_until(entered.is_set)
    engine.step_until(lambda: not engine.scheduler.requests)
    for _ in range(20):
        engine.step()
        assert engine.leader.has_pending_push_work()
    demotions = engine.pool.demotions
    assert demotions is not None
    now = demotions._clock()
    demotions._clock = lambda: now + 3600
    engine.step()
    assert not engine.leader.has_pending_push_work()
    assert not any(engine.present(tokens(24), Tier.SSD))
    found = engine.add(tokens(24), max_tokens=1)
    engine.run_until_finished(found)
    assert engine.external_tokens(found) > 0, "DRAM serves on"
    gate.set()
    engine.add(tokens(8, 500), max_tokens=1)
    engine.step_until(lambda: all(engine.present(tokens(24), Tier.SSD)))
    engine.drain()
    engine.check_stored()
    engine.close()


@pytest.mark.bug("B1")
@pytest.mark.statement("connector", 50)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_one_rank_failed_is_never_published(make_umbp: MakeUmbp, rank: int) -> None:
    """Statements 50 and 53, law L2."""
    engine = make_umbp(tp=2)
    engine.copiers[rank].fails.add(Direction.STORE)
    engine.store(tokens(24))
    assert not any(engine.present(tokens(24)))
    engine.copiers[rank].fails.clear()
    missed = engine.add(tokens(24), max_tokens=1)
    engine.drain()
    assert engine.external_tokens(missed) == 0
    assert all(engine.present(tokens(24)))
    engine.close()


@pytest.mark.statement("connector", 53)
def test_nothing_is_published_before_the_last_rank(make_umbp: MakeUmbp) -> None:
    """Statement 53: one rank is late; until then the blocks do not exist."""
    engine = make_umbp(tp=2)
    engine.copiers[1].hold(Direction.STORE)
    name = engine.add(tokens(24), max_tokens=1)
    engine.run_until_finished(name)
    assert engine.copiers[1].entered[Direction.STORE].wait(PATIENCE)
    for _ in range(20):
        engine.step()
    assert not any(engine.present(tokens(24)))
    engine.release(Direction.STORE)
    engine.drain()
    assert all(engine.present(tokens(24)))
    engine.close()


@pytest.mark.statement("connector", "58a")
@pytest.mark.bug("B15")
@pytest.mark.parametrize("direction", [Direction.LOAD, Direction.STORE])
def test_after_a_failure_a_hundred_transfers_work(make_umbp: MakeUmbp, direction: Direction) -> None:
    """Statement 58a."""
    engine = make_umbp({"dram_capacity": "4MiB"}, num_blocks=400)
    engine.store(tokens(24))
    engine.copiers[0].fails.add(direction)
    engine.add(tokens(30), max_tokens=1)
    engine.drain()
    engine.copiers[0].fails.clear()
    for first in range(100):
        engine.add([first, *tokens(8, 500)], max_tokens=1)
    engine.drain()
    assert engine.reset_prefix_cache()
    names = [engine.add([first, *tokens(8, 500)], max_tokens=1) for first in range(100)]
    engine.drain()
    assert all(engine.external_tokens(name) == 8 for name in names)
    engine.close()


@pytest.mark.statement("connector", 58)
def test_a_pool_without_room_is_a_smaller_pool(make_umbp: MakeUmbp) -> None:
    """Statement 58: the target tier is full of what cannot be evicted; nothing fails."""
    engine = make_umbp({"dram_capacity": "24KiB"}, num_blocks=64, max_model_len=96)
    engine.store(tokens(24))
    engine.hold(Direction.LOAD)
    engine.add(tokens(24), max_tokens=1)
    engine.step()
    other = engine.add(tokens(24, 300), max_tokens=2)
    engine.run_until_finished(other)
    engine.release(Direction.LOAD)
    engine.drain()
    assert engine.stat("dropped_stores", "no_room") > 0
    engine.close()


def test_a_backlog_of_stores_is_bounded(make_umbp: MakeUmbp) -> None:
    engine = make_umbp({"max_pending_stores": 4})
    engine.hold(Direction.STORE)
    engine.add(tokens(64), max_tokens=1)
    for _ in range(3):
        engine.step()
    engine.release(Direction.STORE)
    engine.drain()
    assert engine.stat("dropped_stores", "backlog") == 12
    engine.close()


LEADER_CALLS = {
    "match": "get_num_new_matched_tokens",
    "allocated": "update_state_after_alloc",
    "plan_step": "_plan_step",
    "take_report": "update_connector_output",
    "finished": "request_finished_all_groups",
    "on_new_request": "on_new_request",
}


@pytest.mark.statement("connector", "58b")
@pytest.mark.bug("B16")
@pytest.mark.statement("connector", 57)
@pytest.mark.parametrize("method", LEADER_CALLS)
def test_an_exception_in_the_leader_stays_there(
    make_umbp: MakeUmbp, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statements 57, 58b: one call of one request goes wrong; the engine and everybody else go on."""
    engine = make_umbp()
    engine.store(tokens(24))
    leader = engine.leader.leader
    original = getattr(leader, method)
    broken = [True]

    def once(*args: Any) -> Any:
        if broken:
            broken.clear()
            raise ZeroDivisionError("made by the test")
        return original(*args)

    monkeypatch.setattr(leader, method, once)
    engine.expects_internal_failures = True
    names = [engine.add(tokens(26), max_tokens=4), engine.add(tokens(26, 300), max_tokens=4)]
    engine.run_until_finished(*names)
    assert [engine.finish_reasons[name] for name in names] == ["length", "length"]
    assert engine.internal_failures() == {LEADER_CALLS[method]: 1}
    assert engine.stat("degraded", f"internal_{LEADER_CALLS[method]}") == 1
    other = engine.add(tokens(26, 600), max_tokens=4)
    engine.run_until_finished(other)
    engine.step_until(lambda: all(engine.present(tokens(24, 600))))


@pytest.mark.statement("connector", "58b")
@pytest.mark.bug("B16")
@pytest.mark.statement("connector", 57)
def test_an_exception_between_two_requests_of_a_step(make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decided for the first of them is void: in the next step its blocks may be somebody else's (law L3)."""
    engine = make_umbp(num_blocks=16, max_model_len=56)
    leader = engine.leader.leader
    original = leader._look_at
    turns = iter([False, True])

    def look_at(state: Any, computed: int) -> None:
        if next(turns, False):
            raise ZeroDivisionError("made by the test")
        original(state, computed)

    monkeypatch.setattr(leader, "_look_at", look_at)
    engine.expects_internal_failures = True
    for first in (0, 300):
        engine.add(tokens(24, first), max_tokens=4)
    engine.step()
    assert engine.internal_failures() == {"_plan_step": 1}
    assert engine.reset_prefix_cache(running=True)
    engine.drain()
    assert engine.check_stored() > 0
    engine.close()


def test_an_exception_while_a_load_is_planned_leaves_nothing_behind(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load was promised and its match taken; what it pinned is given back, the request is recomputed."""
    engine = make_umbp()
    engine.store(tokens(24))
    original = engine.pool.directory.touch
    broken = [True]

    def touch(keys: Any) -> None:
        if broken:
            broken.clear()
            raise ZeroDivisionError("made by the test")
        original(keys)

    monkeypatch.setattr(engine.pool.directory, "touch", touch)
    engine.expects_internal_failures = True
    name = engine.add(tokens(26), max_tokens=4)
    engine.drain()
    assert engine.finish_reasons[name] == "length"
    engine.close()


def restarted(make_umbp: MakeUmbp, ssd_dir: Path, **spec: Any) -> UmbpHarness:
    return make_umbp({**SSD, "ssd_dir": str(ssd_dir)}, **spec)


@pytest.mark.parametrize(
    "spec",
    [{}, {"tp": 2}, {"pp": 2}, {"groups": HYBRID}, {"layout": "BLHNC"}],
    ids=lambda spec: str(list(spec.values())),
)
@pytest.mark.statement("connector", 80)
def test_a_restart_serves_from_ssd(make_umbp: MakeUmbp, tmp_path: Path, spec: dict[str, Any]) -> None:
    engine = restarted(make_umbp, tmp_path, **spec)
    engine.store(tokens(24))
    engine.close()
    engine = restarted(make_umbp, tmp_path, **spec)
    again = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.external_tokens(again) == 24
    assert engine.stat("hit_tokens", "ssd") > 0
    engine.check_stored()
    engine.close()


@pytest.mark.statement("connector", 80)
def test_another_engine_shape_does_not_read_it(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    """Identity: two TP ranks' objects mean nothing to one rank, although every byte count may agree."""
    engine = restarted(make_umbp, tmp_path)
    engine.store(tokens(24))
    engine.close()
    for spec in ({"tp": 2}, {"pp": 2}, {"block_size": 8}, {"groups": HYBRID}):
        engine = restarted(make_umbp, tmp_path, **spec)
        missed = engine.add(tokens(26), max_tokens=1)
        engine.drain()
        assert engine.external_tokens(missed) == 0
        engine.close()


def test_a_second_engine_on_the_same_folder_serves_from_memory(
    make_umbp: MakeUmbp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(folder.open_rank_slab.__kwdefaults__, "patience_s", 0.05)
    first = restarted(make_umbp, tmp_path)
    first.store(tokens(24))
    second = restarted(make_umbp, tmp_path)
    assert second.pool.catalogue is None
    second.store(tokens(24))
    again = second.add(tokens(26), max_tokens=1)
    second.drain()
    assert second.external_tokens(again) == 24
    second.close()
    first.drop_from(Tier.DRAM)
    from_disk = first.add(tokens(26), max_tokens=1)
    first.drain()
    assert first.external_tokens(from_disk) == 24
    first.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.statement("connector", 80)
def test_rot_while_the_engine_was_down(make_umbp: MakeUmbp, tmp_path: Path, rank: int) -> None:
    """Law L9: what does not verify after a restart is a miss."""
    engine = restarted(make_umbp, tmp_path, tp=2)
    engine.store(tokens(24))
    engine.close()
    slabs = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20)
    assert len(slabs) == 2
    with slabs[rank].open("r+b") as slab:
        slab.write(b"\xff" * slabs[rank].stat().st_size)
    engine = restarted(make_umbp, tmp_path, tp=2)
    again = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[again] == "length"
    engine.check_stored()
    engine.close()


@pytest.mark.statement("connector", 71)
def test_reset_empties_every_tier(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    """Statement 71: with the connector, also for what was on its way; without it, the pool keeps all."""
    engine = restarted(make_umbp, tmp_path)
    engine.store(tokens(24))
    assert all(engine.present(tokens(24), Tier.SSD))
    engine.hold(Direction.STORE)
    late = engine.add(tokens(24, 300), max_tokens=1)
    engine.run_until_finished(late)
    assert engine.copiers[0].entered[Direction.STORE].wait(PATIENCE)
    engine.scheduler.reset_connector_cache()
    engine.release(Direction.STORE)
    engine.drain()
    assert not any(engine.present(tokens(24)) + engine.present(tokens(24, 300)))
    engine.reset_prefix_cache()
    missed = engine.add(tokens(24), max_tokens=1)
    engine.drain()
    assert engine.external_tokens(missed) == 0
    engine.close()


@pytest.mark.statement("connector", 71)
def test_reset_while_loading(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    """What a load passes through memory after a reset is old: it may reach its request, but not the pool."""
    engine = restarted(make_umbp, tmp_path)
    engine.store(tokens(24))
    engine.drop_from(Tier.DRAM)
    engine.hold(Direction.LOAD)
    name = engine.add(tokens(24), max_tokens=1)
    engine.step()
    assert engine.copiers[0].entered[Direction.LOAD].wait(PATIENCE)
    engine.scheduler.reset_connector_cache()
    engine.release(Direction.LOAD)
    engine.run_until_finished(name)
    assert engine.stat("ops", "load", "done") == 1
    engine.drain()
    engine.check_stored()
    engine.close()


@pytest.mark.statement("connector", 28)
@pytest.mark.statement("connector", 30)
@pytest.mark.statement("connector", 34)
def test_metadata_is_small_and_goes_out_once(make_umbp: MakeUmbp) -> None:
    """Statements 28, 30, 34: the step number grows by one, each op is in one message, an idle step says nothing."""
    engine = make_umbp()
    seen: list[Any] = []
    build = engine.leader.build_connector_meta
    engine.leader.build_connector_meta = lambda output: (seen.append(build(output)), seen[-1])[1]
    for first in (0, 100, 200):
        engine.add(tokens(24, first), max_tokens=12)
    engine.drain()
    steps = [metadata.iteration for metadata in seen]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    ops = [op.op_id for metadata in seen for op in metadata.ops]
    assert len(ops) == len(set(ops)) > 0
    quiet = [metadata for metadata in seen if not metadata.ops]
    assert quiet
    assert max(len(pickle.dumps(metadata)) for metadata in quiet) < 400
    engine.close()


@pytest.mark.statement("connector", 90)
def test_events_name_the_tier(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    """KV events of our tiers go out with the engine's own."""
    engine = restarted(make_umbp, tmp_path, kv_events=True)
    taken: list[Any] = []
    take = engine.leader.take_events
    engine.leader.take_events = lambda: (taken.extend(events := list(take())), events)[1]
    engine.store(tokens(24))
    engine.scheduler.reset_connector_cache()
    engine.add(tokens(5), max_tokens=1)
    engine.drain()
    kinds = {(type(event).__name__, event.medium) for event in taken}
    assert {name for name, _ in kinds} == {"BlockStored", "BlockRemoved"}
    assert len({medium for _, medium in kinds}) == 2
    hashes = [block for event in taken if type(event).__name__ == "BlockStored" for block in event.block_hashes]
    assert len(hashes) >= 12
    engine.close()
