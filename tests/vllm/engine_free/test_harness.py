"""The harness itself: a correct connector passes in every configuration, and every defect is caught."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeEngine
from tests.vllm.harness import (
    ConnectorFault,
    GroupSpec,
    Harness,
    KVMismatch,
    LeakDetected,
    ReportFault,
    StuckTransfer,
    engine,
)
from tests.vllm.harness.traffic import Traffic, tokens

HYBRID = (GroupSpec("full"), GroupSpec("window", window=10))
LATENT = (GroupSpec("mla", head_size=16),)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sync": {"extra": {"sync": True}},
    "slow": {"extra": {"store_steps": 7, "load_steps": 5}},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "v2 runner": {"v2_runner": True},
    "async": {"async_scheduling": True},
    "async lazy": {"async_scheduling": True, "lazy_execution": True, "extra": {"store_steps": 3, "load_steps": 3}},
    "async v2": {"async_scheduling": True, "v2_runner": True},
    "deferred save": {"deferred_save": True, "draft_tokens": 2},
    "chunked": {"max_num_batched_tokens": 13, "max_num_seqs": 8},
    "drafts": {"draft_tokens": 3},
    "hybrid": {"groups": HYBRID},
    "hybrid slow": {"groups": HYBRID, "extra": {"store_steps": 5, "load_steps": 3}, "max_num_batched_tokens": 24},
    "latent tp2": {"groups": LATENT, "tp": 2},
    "block outermost": {"layout": "BLHNC"},
    "no prefix cache": {"prefix_caching": False},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_correct_connector_passes(make_engine: MakeEngine, name: str) -> None:
    engine = make_engine("dict", num_blocks=96, max_model_len=96, **CONFIGURATIONS[name])
    loaded = Traffic(engine, random.Random(name)).run(steps=150)
    engine.close()
    assert loaded > 0


def test_a_small_pool_preempts_and_still_passes(make_engine: MakeEngine) -> None:
    engine = make_engine("dict", num_blocks=30, max_model_len=96, extra={"store_steps": 4, "load_steps": 2})
    traffic = Traffic(engine, random.Random(1), max_tokens=30)
    traffic.run(steps=300)
    engine.close()
    assert traffic.preemptions > 0


def store_and_reload(engine: Harness) -> None:
    """A prompt is stored, forgotten by the engine and asked for again, a little longer."""
    engine.add(tokens(24))
    engine.drain()
    engine.reset_prefix_cache()
    engine.add(tokens(30))
    engine.drain()


def test_wrong_blocks_are_seen(make_engine: MakeEngine) -> None:
    with pytest.raises(KVMismatch, match="read wrong KV at position"):
        store_and_reload(make_engine("WrongBlock"))


def test_kv_of_the_wrong_position_is_seen(make_engine: MakeEngine) -> None:
    """Bug B2: no room at the first match; before the second one the local hit grew."""
    with pytest.raises(KVMismatch):
        grow_local_hit_between_matches(make_engine("StaleLocalHit", num_blocks=25, max_model_len=64))


def test_the_same_story_passes_with_a_correct_connector(make_engine: MakeEngine) -> None:
    engine = make_engine("dict", num_blocks=25, max_model_len=64)
    grow_local_hit_between_matches(engine)
    assert set(engine.finish_reasons.values()) == {"length"}
    engine.close()


def grow_local_hit_between_matches(engine: Harness) -> None:
    """Store 48 tokens; fill the pool; match the 48 tokens without room; let 24 of them become a local hit."""
    engine.add(tokens(48), max_tokens=1)
    engine.drain()
    engine.reset_prefix_cache()
    blocker = engine.add(tokens(60, 500), max_tokens=3)
    engine.step()
    waiting = engine.add(tokens(50), max_tokens=2)
    engine.step()
    assert engine.ledger.lives[waiting].matches[-1][:2] == (0, 48)
    assert not engine.ledger.lives[waiting].loads
    grower = engine.add(tokens(26), max_tokens=1, skip_reading=True)
    engine.scheduler.waiting.remove_requests([engine.scheduler.requests[waiting]])
    engine.run_until_finished(grower, blocker)
    engine.scheduler.waiting.add_request(engine.scheduler.requests[waiting])
    engine.drain()
    assert engine.ledger.lives[waiting].matches[-1][:2] == (24, 24)


def test_blocks_counted_twice_are_seen(make_engine: MakeEngine) -> None:
    """Bug B3: a partial external hit followed by another full prompt block, then the next turn."""
    engine = make_engine("AppendsBlocks")
    store_and_reload(engine)
    engine.reset_prefix_cache()
    engine.add(tokens(36))
    with pytest.raises(KVMismatch):
        engine.drain()


def crowd(engine: Harness) -> None:
    """Many requests through a pool that holds two of them, then all of them again."""
    for first in (0, 100, 200, 300, 400, 500):
        engine.add(tokens(40, first), max_tokens=24)
    engine.drain()
    engine.reset_prefix_cache()
    for first in (0, 100, 200, 300, 400, 500):
        engine.add(tokens(40, first), max_tokens=24)
    engine.drain()


@pytest.mark.parametrize("connector", ["FreesEarly", "IgnoresPreemption"])
def test_reading_reused_blocks_is_seen(make_engine: MakeEngine, connector: str) -> None:
    with pytest.raises(KVMismatch):
        crowd(make_engine(connector, num_blocks=33, max_model_len=96, extra={"store_steps": 12}))


def test_crowding_alone_is_fine(make_engine: MakeEngine) -> None:
    engine = make_engine("dict", num_blocks=33, max_model_len=96, extra={"store_steps": 12})
    crowd(engine)
    assert len(engine.finish_reasons) == 12
    engine.close()


def test_reading_before_the_forward_pass_is_seen(make_engine: MakeEngine) -> None:
    with pytest.raises(KVMismatch):
        store_and_reload(make_engine("StoresBeforeForward"))


def test_publishing_what_one_rank_lost_is_seen(make_engine: MakeEngine) -> None:
    with pytest.raises(KVMismatch, match="rank 1"):
        store_and_reload(make_engine("PublishesFailedStores", tp=2))


def test_sharing_across_salts_is_seen(make_engine: MakeEngine) -> None:
    engine = make_engine("IgnoresSalt")
    engine.add(tokens(24))
    engine.drain()
    engine.add(tokens(24), salt="another tenant")
    with pytest.raises(KVMismatch):
        engine.drain()


def test_a_second_report_is_seen(make_engine: MakeEngine) -> None:
    with pytest.raises(ReportFault, match="received"):
        store_and_reload(make_engine("ReportsLoadsTwice"))


def test_an_unknown_id_is_seen(make_engine: MakeEngine) -> None:
    engine = make_engine("ReportsUnknownRequest")
    engine.add(tokens(24), max_tokens=7)
    with pytest.raises(ReportFault, match="does not know"):
        engine.drain()


@pytest.mark.parametrize("connector", ["ForgetsSent", "ForgetsReceived"])
def test_a_forgotten_report_is_seen(make_engine: MakeEngine, connector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_IDLE_STEPS", 200)
    with pytest.raises(StuckTransfer, match="idle"):
        store_and_reload(make_engine(connector))


def fail_third_object(engine: Harness) -> None:
    """Store six blocks, make the third unreadable on every rank, ask again."""
    engine.add(tokens(24))
    engine.drain()
    engine.reset_prefix_cache()
    for rank in engine.ranks:
        bad = list(rank.connector.worker.objects)[2]
        rank.connector.worker.fails = lambda key, bad=bad: key == bad
    engine.add(tokens(30))
    engine.drain()


@pytest.mark.parametrize("sync", [False, True])
def test_a_failed_load_is_recomputed(make_engine: MakeEngine, sync: bool) -> None:
    engine = make_engine("dict", failure_policy="recompute", extra={"sync": sync}, tp=2)
    fail_third_object(engine)
    assert list(engine.finish_reasons.values()) == ["length", "length"]
    engine.close()


def test_a_failed_load_ends_the_request_if_the_user_wants_it(make_engine: MakeEngine) -> None:
    engine = make_engine("dict", failure_policy="fail")
    fail_third_object(engine)
    assert list(engine.finish_reasons.values()) == ["length", "error"]
    engine.close()


def test_a_hidden_failure_is_seen(make_engine: MakeEngine) -> None:
    with pytest.raises(KVMismatch):
        fail_third_object(make_engine("HidesFailure", failure_policy="recompute"))


def test_a_failed_load_of_several_groups_is_recomputed(make_engine: MakeEngine) -> None:
    engine = make_engine("dict", groups=HYBRID, failure_policy="recompute")
    fail_third_object(engine)
    assert list(engine.finish_reasons.values()) == ["length", "length"]
    engine.close()


def test_block_errors_in_several_groups_are_seen(make_engine: MakeEngine) -> None:
    with pytest.raises(ReportFault, match="KV groups"):
        fail_third_object(make_engine("BlockErrorsOfManyGroups", groups=HYBRID, failure_policy="recompute"))


def test_a_held_block_is_a_leak(make_engine: MakeEngine) -> None:
    engine = make_engine("dict")
    engine.scheduler.kv_cache_manager.block_pool.get_new_blocks(1)
    with pytest.raises(LeakDetected, match="1 blocks"):
        engine.check_no_leak()


def test_every_finding_is_a_connector_fault() -> None:
    assert all(issubclass(kind, ConnectorFault) for kind in (KVMismatch, ReportFault, StuckTransfer, LeakDetected))
