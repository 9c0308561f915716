"""Loads that the forward pass waits for: what vLLM is promised, who may build on it, and what counts afterwards."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.connectors.waiting import PATIENCE
from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction
from umbp_core.tiers import Tier
from umbp_vllm import bands, layer_gate
from umbp_vllm.compat import asks_by_layer, layers_that_do_not_ask

LAYERWISE = {"load_mode": "layerwise"}
SHAPES: list[dict[str, Any]] = [
    {},
    {"tp": 2},
    {"groups": (GroupSpec("mla", head_size=16),), "tp": 2},
    {"layout": "BLHNC"},
]


@pytest.fixture(autouse=True)
def _a_band_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "BAND_BYTES", 1)
    monkeypatch.setattr(layer_gate, "GRACE_S", 0.05)


def last_match(engine: UmbpHarness, name: str) -> tuple[int, int | None, bool]:
    return engine.ledger.lives[name].matches[-1]


@pytest.mark.statement("connector", 98)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hit_in_dram_is_loaded_by_its_own_step(make_umbp: MakeUmbp, shape: dict[str, Any]) -> None:
    engine = make_umbp(LAYERWISE, **shape)
    engine.store(tokens(24))
    name = engine.add(tokens(26), max_tokens=3)
    engine.step()
    assert last_match(engine, name) == (0, 24, False)
    assert len(engine.tokens[name]) == 1, "no step went by before the request was scheduled"
    engine.drain()
    assert engine.stat("ops", "load", "done") == 1
    engine.check_stored()
    engine.close()


def test_of_a_whole_prompt_the_last_token_is_computed_again(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(LAYERWISE)
    engine.store(tokens(24))
    name = engine.add(tokens(24), max_tokens=3)
    engine.drain()
    assert last_match(engine, name) == (0, 23, False)
    assert engine.stat("hit_tokens", "dram") == 23
    assert engine.stat("ops", "load", "done") == 1
    engine.close()


def test_the_default_is_asynchronous(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    engine.store(tokens(24))
    name = engine.add(tokens(26))
    engine.drain()
    assert last_match(engine, name) == (0, 24, True)
    engine.close()


@pytest.mark.statement("connector", 98)
def test_a_block_on_ssd_makes_its_request_wait_and_no_other(make_umbp: MakeUmbp, tmp_path: Any) -> None:
    """L5: no forward pass waits for a disk."""
    engine = make_umbp({**LAYERWISE, "ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"})
    engine.store(tokens(24))
    engine.store(tokens(24, first=500))
    engine.pool.directory.drop(engine.keys(tokens(24))[0][3], Tier.DRAM)
    on_ssd, in_dram = engine.add(tokens(26)), engine.add(tokens(26, first=500))
    engine.drain()
    assert last_match(engine, on_ssd) == (0, 24, True)
    assert last_match(engine, in_dram) == (0, 24, False)
    engine.close()


@pytest.mark.parametrize(
    "spec",
    [
        {"groups": (GroupSpec("full"), GroupSpec("window", window=10))},
        {"groups": (GroupSpec("window", window=16),)},
        {"async_scheduling": True},
        {"pp": 2},
        {"draft_tokens": 2},
    ],
)
def test_where_vllm_cannot_take_tokens_back_loads_are_asynchronous(
    make_umbp: MakeUmbp, spec: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_umbp({**LAYERWISE, "log_level": "warning"}, **spec)
    assert "loads are asynchronous although load_mode is layerwise" in caplog.text
    engine.store(tokens(24))
    name = engine.add(tokens(26))
    engine.drain()
    _, matched, is_async = last_match(engine, name)
    assert matched
    assert is_async
    engine.close()


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("block", range(6))
def test_a_flipped_bit_is_computed_again(make_umbp: MakeUmbp, shape: dict[str, Any], block: int) -> None:
    """L1; the harness compares every byte that is read, and every token."""
    engine = make_umbp(LAYERWISE, **shape)
    engine.store(tokens(24))
    engine.corrupt(len(engine.ranks) - 1, engine.keys(tokens(24))[0][block])
    name = engine.add(tokens(34), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[name] == "length"
    assert engine.stat("failed_blocks", "load", "verify") == 1
    assert engine.check_stored() >= 8 * len(engine.ranks), "also what was computed in the step that failed"
    assert all(engine.present(tokens(32)))
    engine.close()


def test_the_user_may_want_the_request_to_fail(make_umbp: MakeUmbp) -> None:
    engine = make_umbp({**LAYERWISE, "load_failure_policy": "fail"})
    engine.store(tokens(24))
    engine.corrupt(0, engine.keys(tokens(24))[0][2])
    name = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[name] == "error"
    engine.close()


@pytest.mark.parametrize("during", [False, True])
def test_nobody_finds_what_a_failed_load_left_behind(make_umbp: MakeUmbp, during: bool) -> None:
    """L1: vLLM lists the blocks before they are filled; an abort keeps it from filling them again."""
    engine = make_umbp(LAYERWISE)
    engine.store(tokens(40))
    engine.corrupt(0, engine.keys(tokens(40))[0][1])
    name = engine.add(tokens(48), max_tokens=3)
    if during:
        engine.abort_during_step(name)
    engine.step()
    engine.abort(name)
    again = engine.add(tokens(48), max_tokens=3)
    engine.drain()
    assert last_match(engine, again)[0] <= 4, "only what lies before the bad block"
    assert engine.finish_reasons[again] == "length"
    engine.check_stored()
    engine.close()


@pytest.mark.parametrize("bad", [False, True])
def test_twins_do_not_build_on_what_is_being_loaded(make_umbp: MakeUmbp, bad: bool) -> None:
    """L1: the second waits for the step that loads, and then uses vLLM's own copy."""
    engine = make_umbp(LAYERWISE)
    engine.store(tokens(40))
    if bad:
        engine.corrupt(0, engine.keys(tokens(40))[0][4])
    first, second = engine.add(tokens(44), max_tokens=4), engine.add(tokens(44), max_tokens=4)
    engine.step()
    assert engine.ledger.lives[second].matches == [(40, None, False)]
    engine.drain()
    assert engine.finish_reasons == dict.fromkeys(engine.finish_reasons, "length")
    assert last_match(engine, first) == (0, 40, False)
    assert last_match(engine, second)[0] == (16 if bad else 40)
    engine.check_stored()
    engine.close()


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_what_the_loading_step_computes_is_stored_when_it_counts(make_umbp: MakeUmbp, max_tokens: int) -> None:
    """Also when the request ends with that very step."""
    engine = make_umbp(LAYERWISE)
    engine.store(tokens(24))
    engine.add(tokens(40), max_tokens=max_tokens)
    engine.drain()
    assert all(engine.present(tokens(40)))
    engine.check_stored()
    engine.close()


def test_a_copy_that_hangs(make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch) -> None:
    """L3, L4, L6: the step ends with its deadline; the blocks stay out of use until the copy ends."""
    engine = make_umbp(LAYERWISE, tp=2)
    engine.store(tokens(24))
    engine.copiers[1].hold(Direction.LOAD)
    gate = engine.workers[1].gate
    start = gate.start

    def start_and_hang(iteration: int, fence: object) -> None:
        start(iteration, fence)
        assert engine.copiers[1].entered[Direction.LOAD].wait(PATIENCE)
        monkeypatch.setattr(gate, "_clock", lambda: time.monotonic() + 3600)

    monkeypatch.setattr(gate, "start", start_and_hang)
    name = engine.add(tokens(25), max_tokens=3)
    engine.run_until_finished(name)
    assert engine.finish_reasons[name] == "length"
    assert engine.stat("ops", "load", "failed") == 1
    block_pool = engine.scheduler.kv_cache_manager.block_pool
    assert block_pool.get_num_free_blocks() == engine.geometry.scheduler.num_blocks - 1 - 6
    engine.release(Direction.LOAD)
    engine.drain()
    engine.check_no_leak()
    assert engine.stat("failed_blocks", "load", "deadline") == 6
    assert all(engine.present(tokens(24))), "what was slow is not bad"
    engine.close()


def test_a_copy_that_fails(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(LAYERWISE, tp=2)
    engine.store(tokens(24))
    engine.copiers[1].fails.add(Direction.LOAD)
    name = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[name] == "length"
    assert engine.stat("failed_blocks", "load", "device") == 6
    engine.close()


@pytest.mark.parametrize("place", ["load_ahead", "wait", "finish", "poll", "submit_ahead"])
def test_a_bug_of_ours_makes_the_step_void(make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """L1: whatever we do not know to have gone well is reported as bad."""
    engine = make_umbp(LAYERWISE)
    engine.store(tokens(24))
    (worker,) = engine.workers
    owner = {"load_ahead": worker, "poll": worker.engine, "submit_ahead": worker.engine}.get(place, worker.gate)

    def fail(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("a bug")

    monkeypatch.setattr(owner, place, fail)
    engine.expects_internal_failures = True
    name = engine.add(tokens(26), max_tokens=3)
    engine.step()
    assert engine.tokens[name] == []
    engine.drain()
    assert engine.finish_reasons[name] == "length"
    engine.check_stored()
    engine.close()


def test_a_load_that_cannot_be_planned(make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM counts on it in this very step, so its blocks are reported as bad, and the request as nothing."""
    engine = make_umbp(LAYERWISE)
    engine.store(tokens(24))

    def fail(*_: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.pool.loads, "load", fail)
    engine.expects_internal_failures = True
    name = engine.add(tokens(30), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[name] == "length"
    engine.check_stored()
    engine.close()


def test_when_the_forward_pass_asks_for_layers() -> None:
    class Context:
        def __init__(self, metadata: Any, mode: str) -> None:
            self.attn_metadata = metadata
            self.cudagraph_runtime_mode = type("Mode", (), {"name": mode})

    assert asks_by_layer(Context({"layer": 1}, "PIECEWISE"))
    assert asks_by_layer(Context({"layer": 1}, "NONE"))
    assert not asks_by_layer(Context({"layer": 1}, "FULL")), "a replayed graph calls nothing"
    assert not asks_by_layer(Context(None, "NONE"))
    assert not asks_by_layer(None)


def test_layers_that_read_their_cache_without_asking() -> None:
    attention = type("Attention", (), {})
    modules = {"own": type("Special", (attention,), {})(), "indexer": type("IndexerCache", (), {})()}
    config = type("Config", (), {"compilation_config": type("Compilation", (), {"static_forward_context": modules})})
    assert layers_that_do_not_ask(config, ["own", "indexer", "unknown"]) == ["indexer"]


def test_where_layers_do_not_ask_the_step_waits_for_all_of_them(make_umbp: MakeUmbp, monkeypatch: Any) -> None:
    engine = make_umbp(LAYERWISE)
    engine.store(tokens(24))
    (worker,) = engine.workers
    worker._by_layer = False
    waited = []
    wait_layers = worker.engine.wait_layers
    monkeypatch.setattr(worker.engine, "wait_layers", lambda *a: (waited.append(a[1]), wait_layers(*a))[1])
    engine.add(tokens(26))
    engine.drain()
    assert waited == [2], "both layers at once"
    engine.close()
