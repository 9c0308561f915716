"""A real master knows what the engine's block pool and our directory hold: tier by tier, hash by hash."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool

from tests.master.app.master_process import CALL, MasterProcess
from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.reported import FLUSH, Held, difference, held_by, known_at, published, reporter_of, sizes
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.master.model import NodeInfo
from umbp_core.tiers import Tier

HYBRID = (GroupSpec("full"), GroupSpec("window", window=10))
SHAPES: dict[str, dict[str, Any]] = {
    "one group": {},
    "two groups": {"groups": HYBRID, "num_blocks": 80},
    "windows only": {"groups": (GroupSpec("window", window=64),)},
    "tensor parallel": {"tp": 2},
    "pipeline": {"pp": 2, "async_scheduling": True},
}


def tokens(count: int, seed: int) -> list[int]:
    """A prompt that shares no block with one of another seed."""
    return [(17 * index + 29 * seed) % 900 for index in range(count)]


class Master:
    """A master process, and a client that asks it."""

    def __init__(self, process: MasterProcess) -> None:
        self.address = f"umbp://{process.doors['native']}"
        self.client = process.native()

    def node(self, node_id: str) -> NodeInfo | None:
        """What it says of a node."""
        return next((info for info in self.client.list_nodes(CALL) if info.node_id == node_id), None)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with MasterProcess(tmp_path_factory.mktemp("master")) as process:
        opened = Master(process)
        yield opened
        opened.client.close()


class Reported:
    """An engine that reports, beside what the master knows of it."""

    def __init__(self, make: MakeUmbp, master: Master, extra: dict[str, Any] | None = None, **spec: Any) -> None:
        self.node_id = f"node-{random.getrandbits(64):x}"
        self._told = {"master_address": master.address, "node_id": self.node_id}
        self._make, self._extra, self._spec = make, extra or {}, spec
        self._client = master.client
        self.engine = self.start()

    def start(self) -> UmbpHarness:
        self.engine = self._make({**self._extra, **self._told}, **self._spec)
        return self.engine

    def check(self) -> dict[str, int]:
        """The master knows the truth; how much that is per tier."""
        connector = self.engine.leader
        assert reporter_of(connector).flush(FLUSH)
        held, known = self.held(), known_at(self._client, self.node_id)
        assert known == held, difference(known, held)
        return sizes(known)

    def held(self) -> Held:
        return held_by(self.engine.scheduler, self.engine.leader.leader.pool)  # type: ignore[attr-defined]

    def run(self, *prompts: list[int], max_tokens: int = 1) -> None:
        for prompt in prompts:
            self.engine.add(prompt, max_tokens)
        self.engine.drain()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.statement("connector", 90)
def test_every_change_of_a_tier_reaches_the_master(
    make_umbp: MakeUmbp, master: Master, tmp_path: Path, shape: str
) -> None:
    extra = {"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB", "dram_capacity": "192KiB"}
    node = Reported(make_umbp, master, extra, **{"num_blocks": 64, "max_model_len": 96, **SHAPES[shape]})
    assert node.check() == {"HBM": 0, "DRAM": 0, "SSD": 0}
    node.engine.add(tokens(40, seed=1), 1)
    node.engine.step()
    node.check()
    node.engine.drain()
    first = node.check()
    assert min(first.values()) >= 8, "cold run, mirror in DRAM and copy on SSD"
    for seed in range(2, 40):
        node.run(tokens(40, seed=seed))
    full = node.check()
    assert len(node.held()[Tier.DRAM]) < len(node.held()[Tier.SSD]), "DRAM evicts what SSD keeps"
    assert full["HBM"] < 64, "HBM evicts"
    assert node.engine.reset_prefix_cache()
    assert node.check() == {**full, "HBM": 0}, "a reset of vLLM's cache empties HBM only"
    node.run(tokens(40, seed=39))
    assert node.check()["HBM"] >= 8, "what was loaded is in HBM again"
    node.engine.drop_from(Tier.DRAM)
    node.engine.pool.settle()
    assert node.check()["DRAM"] == 0
    assert node.engine.scheduler.reset_connector_cache()
    assert node.check()["SSD"] == 0
    node.engine.close()


def test_what_an_earlier_life_left_on_ssd_is_told_before_any_request(
    make_umbp: MakeUmbp, master: Master, tmp_path: Path
) -> None:
    node = Reported(make_umbp, master, {"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"})
    node.run(*[tokens(40, seed=seed) for seed in range(4)])
    before = node.check()
    node.engine.close()
    node.start()
    assert node.check() == {"HBM": 0, "DRAM": 0, "SSD": before["SSD"]}
    assert before["SSD"] >= 40


@pytest.mark.statement("connector", 88)
def test_a_hash_in_two_blocks_stays_while_one_of_them_does(make_umbp: MakeUmbp, master: Master) -> None:
    """vLLM says that the block is removed; its cache still serves it."""
    node = Reported(make_umbp, master, kv_events=True)
    prompt = tokens(32, seed=7)
    node.run(prompt)
    node.run(prompt)  # the last token is always computed, and its block then is there twice
    pool = node.engine.scheduler.kv_cache_manager.block_pool
    key = node.engine.keys(prompt)[0][-1]
    copies = pool.cached_block_hash_to_block._cache[key]
    assert len(copies) == 2
    assert published(key[:-4]) in node.held()[Tier.HBM]
    one, other = list(copies)
    node.engine.scheduler.kv_cache_manager.evict_blocks({one})
    node.engine.leader.take_events()
    removed = [event for event in pool.take_events() if type(event).__name__ == "BlockRemoved"]
    assert len(removed) == 1, "a reader of vLLM's events forgets the hash now"
    node.check()
    assert published(key[:-4]) in node.held()[Tier.HBM]
    node.engine.scheduler.kv_cache_manager.evict_blocks({other})
    node.engine.leader.take_events()
    assert published(key[:-4]) not in node.held()[Tier.HBM]
    node.check()


@pytest.mark.parametrize("form", ["int64", "hex"])
def test_hashes_are_told_in_the_form_of_vllms_events(
    make_umbp: MakeUmbp, master: Master, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", str(int(form == "int64")))
    node = Reported(make_umbp, master, kv_events=True)
    events: list[Any] = []
    take = node.engine.scheduler.kv_cache_manager.take_events

    def noted() -> Any:
        taken = take()
        events.extend(taken)
        return taken

    node.engine.scheduler.kv_cache_manager.take_events = noted
    node.run(tokens(40, seed=3))
    node.check()
    shown = [each for event in events for each in event.block_hashes]
    words = {str(each).encode() if isinstance(each, int) else each.hex().encode() for each in shown}
    assert len(words) >= 9
    assert words == node.held()[Tier.HBM]
    info = master.node(node.node_id)
    assert info is not None
    assert f"hash_form={form}" in info.tags


def test_engines_that_do_not_report_start_nothing(make_umbp: MakeUmbp, master: Master) -> None:
    told = {"master_address": master.address, "node_id": "silent"}
    for extra in ({}, {**told, "report": False}):
        engine = make_umbp(extra)
        assert engine.leader._reporting is None  # type: ignore[attr-defined]
        pool = engine.scheduler.kv_cache_manager.block_pool
        assert "get_new_blocks" in vars(pool), "the harness itself watches"
        assert "cache_full_blocks" not in vars(pool)
    assert master.node("silent") is None


def test_what_the_reporter_counts_is_in_vllms_statistics(
    make_umbp: MakeUmbp, master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbp_vllm.reporting.MEASURE_INTERVAL_S", 0.0)
    node = Reported(make_umbp, master)
    node.run(tokens(40, seed=1))
    node.check()
    node.run(tokens(40, seed=2))
    node.check()
    node.run(tokens(40, seed=3), tokens(40, seed=4))
    reported = held_by(node.engine.scheduler, None)
    assert node.engine.stat("report_hashes", "hbm", "came") >= 20
    assert node.engine.stat("report_hashes", "hbm", "came") <= len(reported[Tier.HBM])
    assert node.engine.stat("report_hashes", "dram", "came") >= 10
    assert node.engine.stat("report_acknowledged_hashes") >= 20
    assert node.engine.stat("report_failures", "engine") == 0


def test_more_than_may_wait_is_replaced_by_the_truth(make_umbp: MakeUmbp, master: Master, tmp_path: Path) -> None:
    node = Reported(make_umbp, master, {"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"})
    node.run(tokens(40, seed=1))
    before = node.check()
    reporting = node.engine.leader._reporting  # type: ignore[attr-defined]
    feeds = [reporting._hbm, node.engine.pool.teller._feed]
    for feed in feeds:
        feed._max_waiting = 0
    for seed in range(2, 6):
        node.run(tokens(40, seed=seed))
    assert node.engine.reset_prefix_cache()
    node.run(tokens(40, seed=6))
    after = node.check()
    assert after["DRAM"] == before["DRAM"] + 50
    assert after["HBM"] == 10
    assert reporter_of(node.engine.leader).stats().overflows >= 10
    assert reporter_of(node.engine.leader).stats().failures == 0


@pytest.mark.parametrize("method", ["get_new_blocks", "cache_full_blocks"])
def test_on_an_unknown_vllm_hbm_is_left_out_and_said_once(
    make_umbp: MakeUmbp,
    master: Master,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    original = getattr(BlockPool, method)
    monkeypatch.setattr(BlockPool, method, lambda self, *given, **named: original(self, *given, **named))
    node = Reported(make_umbp, master, {"log_level": "warning"})
    node.run(tokens(40, seed=1))
    assert reporter_of(node.engine.leader).flush(FLUSH)
    known = known_at(master.client, node.node_id)
    assert sizes(known) == {"HBM": 0, "DRAM": 10, "SSD": 0}
    said = [record.getMessage() for record in caplog.records if "HBM" in record.getMessage()]
    assert len(said) == 1
    assert method in said[0]
