"""What the leader tells the workers with each step (conformance statements 28 to 34, 42, 43)."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import Traffic, tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction
from umbp_core.slot_table import Life
from umbp_vllm.metadata import StepMetadata


def watch(engine: UmbpHarness) -> list[StepMetadata]:
    """Every metadata that the leader builds from now on."""
    seen: list[StepMetadata] = []
    build = engine.leader.build_connector_meta

    def build_connector_meta(output: Any) -> Any:
        seen.append(build(output))  # type: ignore[arg-type]
        return seen[-1]

    engine.leader.build_connector_meta = build_connector_meta  # type: ignore[method-assign]
    return seen


@pytest.mark.statement("connector", 29)
def test_a_step_names_who_waits_for_which_loads_and_every_block_of_every_op(make_umbp: MakeUmbp) -> None:
    """A worker needs nothing else: block ids, pages, checksums of all ranks, and by when."""
    engine = make_umbp(tp=2)
    engine.store(tokens(24))
    seen = watch(engine)
    name = engine.add(tokens(26), max_tokens=2)
    engine.step()
    (metadata,) = seen
    (load,) = metadata.ops
    (slot,) = metadata.new_slots
    assert (slot.request_id, slot.op_ids) == (name, (load.op_id,))
    table = engine.scheduler.kv_cache_manager.get_block_ids(name)[0]
    assert [block.hbm_block for block in load.blocks] == table[:6]
    assert [block.key for block in load.blocks] == engine.keys(tokens(24))[0]
    assert {len(block.checksums) for block in load.blocks} == {2 * 16}
    assert (load.direction, load.request_id) == (Direction.LOAD, name)
    engine.drain()
    engine.close()


@pytest.mark.statement("connector", 30)
@pytest.mark.statement("connector", 28)
@pytest.mark.parametrize("spec", [{}, {"async_scheduling": True, "tp": 2}], ids=["v1", "async"])
@pytest.mark.parametrize("seed", range(3))
def test_each_op_is_in_one_metadata_and_steps_are_counted(
    make_umbp: MakeUmbp, tmp_path: Path, spec: dict[str, Any], seed: int
) -> None:
    """Whatever the traffic: what was opened was told once, and with it the slot of each load."""
    extra = {"ssd_dir": str(tmp_path), "ssd_capacity": "2MiB"}
    engine = make_umbp(extra, num_blocks=64, max_model_len=96, **spec)
    seen = watch(engine)
    opened: list[str] = []
    original = engine.pool.ledger.open
    engine.pool.ledger.open = lambda op: (opened.append(op.op_id), original(op))[1]  # type: ignore[method-assign]
    Traffic(engine, random.Random(seed)).run(steps=120)
    steps = [metadata.iteration for metadata in seen]
    assert steps == list(range(1, len(steps) + 1))
    told = [op for metadata in seen for op in metadata.ops]
    assert Counter(op.op_id for op in told) == Counter(opened)
    loads = Counter(op.op_id for op in told if op.direction is Direction.LOAD)
    assert loads == Counter(op_id for metadata in seen for slot in metadata.new_slots for op_id in slot.op_ids)
    assert len(loads) > 0
    engine.close()


@pytest.mark.statement("connector", 31)
def test_what_a_loaded_request_computes_later_is_stored_from_where_it_lies(make_umbp: MakeUmbp) -> None:
    """Loaded in one step, scheduled as new in a later one, stored in that and in those after it."""
    engine = make_umbp(max_num_batched_tokens=16)
    engine.store(tokens(16))
    seen = watch(engine)
    name = engine.add(tokens(41), max_tokens=6)
    tables: dict[int, list[int]] = {}
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        if name in engine.scheduler.requests:
            tables[seen[-1].iteration] = engine.scheduler.kv_cache_manager.get_block_ids(name)[0]
    engine.drain()
    keys = engine.keys([*tokens(41), *engine.tokens[name]])[0]
    loads = [op for metadata in seen for op in metadata.ops if op.direction is Direction.LOAD]
    stores = [(metadata.iteration, op) for metadata in seen for op in metadata.ops if op.direction is Direction.STORE]
    assert [len(op.blocks) for op in loads] == [4]
    assert len(stores) > 2
    last = max(tables)
    stored = {block.key: block.hbm_block for _, op in stores for block in op.blocks}
    assert stored == {key: tables[last][index] for index, key in enumerate(keys) if index >= 4 and key in stored}
    assert list(stored) == keys[4 : 4 + len(stored)]
    assert engine.check_stored() >= 10
    engine.close()


@pytest.mark.statement("connector", 32)
def test_a_request_that_is_not_in_a_step_goes_on_later_without_a_new_lookup(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(max_num_batched_tokens=64)
    first, second = engine.add(tokens(20), max_tokens=12), engine.add(tokens(20, 300), max_tokens=12)
    engine.step()
    engine.step()
    slots = {state.request.request_id: state.slot for state in engine.leader.leader._requests.values()}
    engine.scheduler.max_num_scheduled_tokens = 1
    for _ in range(3):
        engine.step()
    assert (slots[first].life, slots[second].life) == (Life.DECODING, Life.SKIPPED_DECODE)
    engine.scheduler.max_num_scheduled_tokens = 64
    engine.step()
    assert slots[second].life is Life.DECODING
    engine.drain()
    assert [len(engine.ledger.lives[name].matches) for name in (first, second)] == [1, 1]
    assert engine.check_stored() > 10
    engine.close()


@pytest.mark.statement("connector", 33)
def test_a_request_that_nobody_announced_is_computed_and_counted(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    announce = engine.leader.on_new_request
    engine.leader.on_new_request = lambda request: None  # type: ignore[method-assign]
    stranger = engine.add(tokens(24), max_tokens=3)
    engine.leader.on_new_request = announce  # type: ignore[method-assign]
    known = engine.add(tokens(24, 300), max_tokens=3)
    engine.drain()
    assert [engine.finish_reasons[name] for name in (stranger, known)] == ["length", "length"]
    assert engine.stat("degraded", "unknown_request") >= 1
    assert (any(engine.present(tokens(24))), all(engine.present(tokens(24, 300)))) == (False, True)
    engine.close()


@pytest.mark.statement("connector", 34)
def test_a_step_in_which_nothing_changes_says_as_much_for_many_as_for_few(make_umbp: MakeUmbp) -> None:
    sizes = []
    for running in (1, 14):
        engine = make_umbp({"store_decode_blocks": False}, num_blocks=400)
        engine.pace()
        for first in range(running):
            engine.add([first, *tokens(20)], max_tokens=10)
        for _ in range(4):
            engine.step()
        seen = watch(engine)
        engine.step()
        assert len(engine.scheduler.running) == running
        sizes.append(len(pickle.dumps(seen[0])))
        engine.drain()
        engine.close()
    assert sizes[0] == sizes[1] < 600


@pytest.mark.statement("connector", 42)
def test_stores_need_no_hook_of_a_layer(make_umbp: MakeUmbp) -> None:
    """With whole graphs vLLM calls none; the end of the step is enough, also where stores go by layer."""
    for extra in ({}, {"store_granularity": "layer"}):
        engine = make_umbp(extra)
        for rank in engine.ranks:
            rank.connector.save_kv_layer = lambda *_, **__: None  # type: ignore[method-assign]
        engine.store(tokens(24))
        assert all(engine.present(tokens(24)))
        assert engine.check_stored() == 6
        engine.close()


@pytest.mark.statement("connector", 43)
@pytest.mark.parametrize("spec", [{}, {"tp": 2}, {"v2_runner": True}], ids=["v1", "tp2", "v2"])
def test_a_step_whose_last_hook_never_runs_has_its_ops_carried_to_the_next(
    make_umbp: MakeUmbp, spec: dict[str, Any]
) -> None:
    """On one rank ``wait_for_save`` is left out in every other step, in loads and stores."""
    engine = make_umbp(**spec)
    connector = engine.ranks[-1].connector
    original = connector.wait_for_save
    turns = iter(range(10**6))
    connector.wait_for_save = lambda: original() if next(turns) % 2 else None  # type: ignore[method-assign]
    for _ in range(2):
        engine.store(tokens(24))
        assert all(engine.present(tokens(24)))
    again = engine.add(tokens(26), max_tokens=6)
    engine.drain()
    assert engine.external_tokens(again) == 24
    assert engine.stat("degraded", "lost_step") == 0
    assert engine.check_stored() >= 6
    engine.close()
