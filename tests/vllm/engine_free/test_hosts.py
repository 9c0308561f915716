"""The connector elsewhere: under older interfaces, with a late handshake, beside another connector, data parallel."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from tests.connectors.waiting import PATIENCE
from tests.vllm.engine_free.conftest import MakeEngine, MakeUmbp
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.traffic import Traffic, tokens
from tests.vllm.harness.umbp import EXTRA
from umbp_core.ops import Direction
from umbp_vllm.connector import UmbpConnector

HYBRID = (GroupSpec("full"), GroupSpec("window", window=10))


@pytest.fixture
def old_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM 0.28 and 0.29 call: no cache manager but its block pool, and ``get_finished``."""

    def bind_kv_cache_manager(connector: UmbpConnector, manager: Any) -> None:
        connector.bind_gpu_block_pool(manager.block_pool)

    monkeypatch.setattr(UmbpConnector, "bind_kv_cache_manager", bind_kv_cache_manager)
    monkeypatch.setattr(UmbpConnector, "get_transfer_results", through_get_finished(UmbpConnector.get_transfer_results))


def through_get_finished(real: Callable[..., Any]) -> Callable[..., Any]:
    """The new runner's question answered by the connector's answer to the old one."""
    inside: list[UmbpConnector] = []

    def get_transfer_results(connector: UmbpConnector, finished: set[str]) -> Any:
        if inside:
            return real(connector, finished)
        inside.append(connector)
        sending, recving = connector.get_finished(finished)
        inside.clear()
        return KVConnectorTransferResults(set(sending or ()), set(recving or ()))

    return get_transfer_results


@pytest.mark.usefixtures("old_interface")
@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"v2_runner": True},
        {"groups": HYBRID, "num_blocks": 60},
        {"max_num_batched_tokens": 13, "max_num_seqs": 8},
        {"async_scheduling": True},
        {"draft_tokens": 3},
    ],
    ids=["plain", "v2 runner", "hybrid", "chunked", "async", "drafts"],
)
@pytest.mark.statement("connector", 84)
@pytest.mark.bug("B3")
def test_the_older_interface(make_umbp: MakeUmbp, spec: dict[str, Any]) -> None:
    """Block tables are then followed through the scheduler's outputs, preemptions included."""
    engine = make_umbp(**{"num_blocks": 30, "max_model_len": 96, **spec})
    assert engine.leader.leader.tables.follows_outputs
    engine.pace()
    traffic = Traffic(engine, random.Random(3), max_tokens=40)
    loaded = traffic.run(steps=250)
    engine.check_stored()
    engine.close()
    assert loaded > 0
    assert traffic.preemptions > 0


@pytest.mark.usefixtures("old_interface")
def test_a_failed_load_through_the_older_interface(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    engine.add(tokens(24), max_tokens=1)
    engine.drain()
    engine.reset_prefix_cache()
    engine.corrupt(0, engine.keys(tokens(24))[0][0])
    again = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    assert engine.finish_reasons[again] == "length"
    assert engine.stat("failed_blocks", "load", "verify") == 1
    engine.close()


@pytest.mark.statement("connector", 13)
def test_hellos_that_come_with_the_first_step(make_umbp: MakeUmbp) -> None:
    """Statement 13: without the handshake the answer is "not yet", then what the pool holds, then at last a miss."""
    engine = make_umbp(shake_hands=False, tp=2)
    name = engine.add(tokens(24), max_tokens=3)
    engine.step()
    answers = [answer for _, answer, _ in engine.ledger.lives[name].matches]
    assert answers == [None]
    engine.drain()
    assert engine.finish_reasons[name] == "length"
    assert all(engine.present(tokens(24)))
    engine.close()


@pytest.mark.statement("connector", 81)
def test_workers_that_never_say_hello(make_umbp: MakeUmbp) -> None:
    """The wait has an end, and the engine then works without a pool."""
    engine = make_umbp({"lookup_timeout_ms": 20}, shake_hands=False)
    for rank in engine.ranks:
        rank.connector.build_connector_worker_meta = lambda: None
    name = engine.add(tokens(24), max_tokens=3)
    engine.run_until_finished(name)
    assert engine.finish_reasons[name] == "length"
    assert engine.leader.leader.pool is None


@pytest.mark.parametrize("first", ["umbp", "dict"])
def test_beside_another_connector(make_engine: MakeEngine, first: str) -> None:
    """vLLM's ``MultiConnector`` asks its children in turn; the one not chosen still sees the request's blocks."""
    children = {
        "umbp": {"kv_connector": "umbp", "kv_role": "kv_both", "kv_connector_extra_config": dict(EXTRA)},
        "dict": {"kv_connector": "dict", "kv_role": "kv_both"},
    }
    order = [children[first], *(child for name, child in children.items() if name != first)]
    engine = make_engine(
        "MultiConnector",
        extra={"connectors": order},
        num_blocks=60,
        max_model_len=96,
        failure_policy="recompute",
    )
    loaded = Traffic(engine, random.Random(first)).run(steps=200)
    engine.close()
    assert loaded > 0


@pytest.mark.statement("connector", 86)
def test_data_parallel_engines_keep_apart(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    """Two engines of one model and one SSD folder: each serves, stores and restarts on its own."""
    extra = {"ssd_dir": str(tmp_path), "ssd_capacity": "8MiB"}
    for life in range(2):
        engines = [make_umbp(extra, data_parallel=(rank, 2), engine_id=f"engine_dp{rank}") for rank in range(2)]
        for rank, engine in enumerate(engines):
            assert engine.pool.catalogue is not None
            name = engine.add(tokens(24, 100 * rank), max_tokens=1)
            engine.drain()
            assert engine.external_tokens(name) == (24 if life else 0)
            engine.check_stored()
        for engine in engines:
            engine.close()


def test_stores_go_after_loads(make_umbp: MakeUmbp) -> None:
    """A load does not wait for the stores that were there before it, of which one is being copied."""
    engine = make_umbp()
    engine.add(tokens(24), max_tokens=1)
    engine.drain()
    engine.reset_prefix_cache()
    engine.hold(Direction.STORE)
    for first in (100, 200, 300):
        engine.add(tokens(24, first), max_tokens=1)
    engine.step()
    engine.step()
    assert engine.copiers[0].entered[Direction.STORE].wait(PATIENCE)
    loading = engine.add(tokens(26), max_tokens=1)
    engine.step_until(engine.copiers[0].entered[Direction.LOAD].is_set)
    engine.release(Direction.STORE)
    engine.drain()
    assert engine.external_tokens(loading) == 24
    engine.close()
