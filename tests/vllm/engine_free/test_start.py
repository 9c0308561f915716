"""How a pool begins: who has to be there, how large it gets, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.errors import StateError
from umbp_core.tiers import Tier
from umbp_vllm import compat, leader
from umbp_vllm.metadata import PROTOCOL_VERSION, RankHello

PAGE = 4096
"""What an object of the tests' engines takes."""


def hellos(engine: UmbpHarness) -> list[RankHello]:
    return [worker.hello for worker in engine.workers]


def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sentences that the leader warns with, from now on."""
    sentences: list[str] = []
    monkeypatch.setattr(leader.logger, "warning", lambda text, *values: sentences.append(text % values))
    return sentences


@pytest.mark.statement("connector", 81)
def test_the_pool_opens_when_every_rank_has_spoken_and_the_missing_ones_are_named(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own start waits for its ranks; whoever speaks later than a lookup may wait is named, once."""
    engine = make_umbp({"lookup_timeout_ms": 1}, tp=4, shake_hands=False)
    for rank in engine.ranks:
        rank.connector.build_connector_worker_meta = lambda: None
    sentences = said(monkeypatch)
    first, second, third, fourth = hellos(engine)
    inner = engine.leader.leader
    inner.greet([second, fourth])
    engine.run_until_finished(engine.add(tokens(24)), engine.add(tokens(24)))
    assert inner.pool is None
    assert [sentence for sentence in sentences if "ranks 0, 2" in sentence] == sentences != []
    assert engine.stat("degraded", "hello") == len(sentences) == 1
    inner.greet([first])
    assert inner.pool is None
    inner.greet([third])
    assert inner.pool is not None


@pytest.mark.statement("connector", 87)
def test_a_worker_of_another_protocol_is_refused_by_its_version(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_umbp(tp=2, shake_hands=False)
    sentences = said(monkeypatch)
    first, second = hellos(engine)
    engine.leader.leader.greet([first, msgspec.structs.replace(second, version=PROTOCOL_VERSION + 1)])
    assert engine.leader.leader.pool is None
    (sentence,) = sentences
    assert f"worker 1 speaks umbp protocol {PROTOCOL_VERSION + 1}, the scheduler {PROTOCOL_VERSION}" in sentence
    name = engine.add(tokens(24))
    engine.run_until_finished(name)
    assert engine.finish_reasons[name] == "length"


@pytest.mark.parametrize(("version", "sentences"), [("0.99.0", 1), (compat.vllm_version(), 0)])
def test_the_log_of_the_start_says_that_a_vllm_is_not_a_supported_one(
    make_umbp: MakeUmbp,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
    sentences: int,
) -> None:
    """Each half says it in its own process."""
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    make_umbp({"log_level": "warning"}).close()
    said = [record.getMessage() for record in caplog.records if "tested with vLLM" in record.getMessage()]
    assert said == [compat.version_notice(version)] * 2 * sentences


@pytest.mark.statement("connector", 77)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_capacity_is_divided_by_the_bytes_of_a_block_on_all_ranks(make_umbp: MakeUmbp, tp: int) -> None:
    engine = make_umbp({"dram_capacity": tp * 10 * PAGE + 100}, tp=tp)
    assert {hello.page_bytes for hello in hellos(engine)} == {PAGE}
    assert engine.pool.directory.stats(Tier.DRAM).total_pages == 10
    engine.close()


@pytest.mark.statement("connector", 82)
def test_the_smallest_rank_decides_how_many_blocks_there_are(make_umbp: MakeUmbp) -> None:
    """Their sizes may differ: pages are as large as the largest object of any rank."""
    engine = make_umbp(tp=2, shake_hands=False)
    first, second = hellos(engine)
    larger = msgspec.structs.replace(
        second, dram_pages=7, page_bytes=2 * PAGE, object_bytes=tuple(2 * size for size in second.object_bytes)
    )
    engine.leader.leader.greet([first, larger])
    assert engine.pool.directory.stats(Tier.DRAM).total_pages == 7
    assert engine.pool.stores._object_bytes == larger.object_bytes


@pytest.mark.statement("connector", 83)
def test_kv_caches_are_registered_once(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    (rank,) = engine.ranks
    with pytest.raises(StateError, match="registered already"):
        rank.connector.register_kv_caches(rank.views)
    engine.store(tokens(24))
    assert all(engine.present(tokens(24)))
    engine.close()


@pytest.mark.statement("connector", 74)
def test_a_dram_tier_of_a_few_blocks_is_a_way_through_to_ssd(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    """There is always DRAM between the device and SSD; it may be as small as what is on its way."""
    engine = make_umbp({"dram_capacity": 8 * PAGE, "ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"})
    prompts = [tokens(24, first=100 * number) for number in range(5)]
    for prompt in prompts:
        engine.store(prompt)
    assert all(engine.present(prompts[0], Tier.SSD) + engine.present(prompts[4], Tier.SSD))
    assert not any(engine.present(prompts[0], Tier.DRAM))
    name = engine.add(prompts[0] + [999])
    engine.drain()
    assert engine.external_tokens(name) == 24
    assert engine.stat("hit_tokens", "ssd") == 24
    engine.close()


@pytest.mark.statement("connector", 79)
def test_one_other_token_changes_the_keys_from_its_block_on(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    (one,) = engine.keys(tokens(24))
    (other,) = engine.keys([*tokens(9), 777, *tokens(14, first=10)])
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])
    assert engine.keys(tokens(24) + [5]) == [one]
    assert {len(key) for key in one} == {32 + 4}, "256 bits, and the group"
    engine.close()
