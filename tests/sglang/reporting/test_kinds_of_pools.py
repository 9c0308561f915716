"""Namespaces, pools in several parts, ranks, and storage that comes and goes: the same truth in each of them."""

from __future__ import annotations

import dataclasses

import pytest

from tests.connectors.reporting.at_master import DRAM, HBM, SSD, known_at
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.shapes import FULL, LARGE_PAGES, prompt_of
from tests.sglang.reporting.conftest import Start
from tests.sglang.reporting.rig import NODE, Reported, published

PROMPT = prompt_of(FULL, 6)
SPACES = {
    "salt": Prompt(PROMPT.tokens, cache_salt="salt"),
    "extra key": Prompt(PROMPT.tokens, extra_key="one"),
    "both": Prompt(PROMPT.tokens, extra_key="one", cache_salt="salt"),
    "adapter": Prompt(PROMPT.tokens, extra_key="its key"),
}


def ids(prompt: Prompt, node: Reported) -> set[bytes]:
    return set(published(prompt, node.size, node.engine.names))


def end(node: Reported) -> None:
    node.engine.stop()
    node.component.kv_event_publisher.shutdown()


@pytest.mark.parametrize("memory", ["cache", "buffer_only"])
@pytest.mark.parametrize("space", SPACES)
def test_a_namespace_has_the_names_of_its_events_on_every_tier(start: Start, space: str, memory: str) -> None:
    prompt = SPACES[space]
    first = start(memory=memory)
    first.engine.names._names["its key"] = "name"
    first.knows([prompt])
    first.engine.compute(prompt)
    first.assert_equal()
    first.engine.offload(prompt)
    assert first.assert_equal()[DRAM] == ids(prompt, first)
    end(first)
    second = start(memory=memory)
    second.engine.names._names["its key"] = "name"
    second.knows([prompt])
    assert not second.told()[SSD] & ids(prompt, second), "nobody has said yet what these pages are"
    assert second.engine.prefetch(prompt) == len(prompt)
    told = second.assert_equal()
    assert told[SSD] == ids(prompt, second)


def test_pages_in_several_parts_are_told_when_all_parts_are_there(start: Start) -> None:
    halves = {"dram_capacity": "64KiB", "ssd_capacity": "1500KiB", "tp_lcm_size": 2}
    node = start(layout="page_head", extra=halves)
    prompts = [prompt_of(FULL, 6, first) for first in (1, 100, 200, 300)]
    node.knows(prompts)
    for prompt in prompts:
        node.engine.compute(prompt)
        node.engine.offload(prompt)
        node.assert_equal()
    pool = node.engine.backend._pools.get("kv")
    assert len(pool.shards) == 2
    pool.shards[0].clear()
    assert node.in_pool()[SSD] == set()
    assert SSD not in node.assert_equal(), "half a page is no page"


def test_a_page_without_its_indexers_part_is_not_told(start: Start) -> None:
    node = start(cfg=LARGE_PAGES, core="python", layout="page_first_direct", mla=True, indexer=True)
    prompt = prompt_of(LARGE_PAGES, 4)
    node.knows([prompt])
    node.engine.compute(prompt)
    node.engine.offload(prompt)
    node.engine.flush()
    assert node.assert_equal()[DRAM] == ids(prompt, node)
    node.engine.backend._pools.get("indexer").clear()
    assert node.assert_equal() == {}, "KV alone cannot be used"


def test_a_detached_storage_is_told_gone_and_an_attached_one_there(start: Start) -> None:
    node = start()
    node.knows([PROMPT])
    node.engine.compute(PROMPT)
    node.engine.offload(PROMPT)
    whole = node.assert_equal()
    assert whole == {tier: ids(PROMPT, node) for tier in (HBM, DRAM, SSD)}
    assert node.engine.detach()[0]
    assert node.told() == {tier: whole[tier] for tier in (HBM, DRAM)}, "L1 and L2 stay"
    assert node.engine.attach()[0]
    assert node.told() == whole
    node.engine.flush()
    assert node.told() == {SSD: whole[SSD]}


def test_every_rank_with_a_pool_of_its_own_is_a_node(start: Start) -> None:
    cfg = dataclasses.replace(FULL, head_num=1)
    ranks = [start(cfg=cfg, tp=(rank, 2)) for rank in range(2)]
    for node in ranks:
        node.knows([PROMPT])
        node.engine.compute(PROMPT)
        node.engine.offload(PROMPT)
    first, second = (node.told(f"{NODE}:dp0:pp0:tp{rank}") for rank, node in enumerate(ranks))
    assert set(first) == {HBM, DRAM, SSD}
    assert second == {DRAM: ids(PROMPT, ranks[1]), SSD: ids(PROMPT, ranks[1])}, "events are the first rank's"


def test_a_rank_that_reads_its_siblings_pool_is_no_node(start: Start) -> None:
    ranks = [start(core="python", mla=True, tp=(rank, 2)) for rank in range(2)]
    for node in ranks:
        node.knows([PROMPT])
        node.engine.compute(PROMPT)
        node.engine.offload(PROMPT)
    assert ranks[1].engine.backend.reporting is None
    assert set(ranks[0].told(f"{NODE}:dp0:pp0:tp0")) >= {HBM, DRAM}
    assert known_at(ranks[0].master, f"{NODE}:dp0:pp0:tp1") == {}
