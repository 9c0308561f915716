"""KV events of the pool's tiers say what vLLM's own events say about the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.tiers import Tier

PROMPT = tokens(24)
HYBRID = (GroupSpec("full"), GroupSpec("window", window=10))
UNEVEN = (GroupSpec("full"), GroupSpec("window", heads=1, window=16))
"""Blocks of two sizes: the larger ones have the tokens of two hashes."""

Block: TypeAlias = "tuple[Any, ...]"
"""Group, hash, the hash before, tokens, block size, and the adapter's number and name."""


class Told:
    """What one engine publishes: vLLM's own events, and those of the pool's tiers by medium.

    vLLM leaves blocks out that no hit needs (those before a window), but not their tokens.  Such an event does not say
    which tokens are whose and is left out here, so the engine should compute few blocks in a step.
    """

    def __init__(self, engine: UmbpHarness) -> None:
        self.own: dict[tuple[int, Any], Block] = {}
        self.tiers: dict[str, list[Block]] = {"CPU": [], "STORAGE": []}
        self.removed: dict[str, set[tuple[int, Any]]] = {"CPU": set(), "STORAGE": set()}
        self._tap(engine.scheduler.kv_cache_manager, self._note_own)
        self._tap(engine.leader, self._note_tiers)

    @staticmethod
    def _tap(source: Any, note: Callable[[Any], None]) -> None:
        take = source.take_events

        def take_events() -> list[Any]:
            events = list(take())
            for event in events:
                note(event)
            return events

        source.take_events = take_events

    def _note_own(self, event: Any) -> None:
        if isinstance(event, BlockStored):
            assert event.medium == "GPU"
            if len(event.token_ids) == event.block_size * len(event.block_hashes):
                self.own.update({block[:2]: block for block in blocks_of(event)})

    def _note_tiers(self, event: Any) -> None:
        if isinstance(event, BlockStored):
            self.tiers[event.medium].extend(blocks_of(event))
        else:
            assert isinstance(event, BlockRemoved)
            self.removed[event.medium] |= {(event.group_idx, block) for block in event.block_hashes}


def blocks_of(event: BlockStored) -> list[Block]:
    """The blocks of an event, which names a run of them by their common parent and tokens."""
    parent, blocks = event.parent_block_hash, []
    for number, block in enumerate(event.block_hashes):
        its_tokens = tuple(event.token_ids[number * event.block_size : (number + 1) * event.block_size])
        adapter = event.lora_id, event.lora_name
        blocks.append((event.group_idx, block, parent, its_tokens, event.block_size, *adapter))
        parent = block
    return blocks


@pytest.mark.statement("connector", 90)
@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ({}, {}),
        ({}, {"salt": "a"}),
        ({}, {"lora": "poet"}),
        ({"groups": HYBRID, "max_num_batched_tokens": 4, "max_num_seqs": 4}, {}),
        ({"groups": UNEVEN, "max_num_batched_tokens": 8, "max_num_seqs": 4}, {}),
        ({"tp": 2}, {}),
    ],
    ids=["plain", "salt", "adapter", "several groups", "several hashes per block", "two ranks"],
)
def test_events_say_of_a_block_what_vllms_own_say(
    make_umbp: MakeUmbp, tmp_path: Path, spec: dict[str, Any], asked: dict[str, Any]
) -> None:
    extra = {"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}
    engine = make_umbp(extra, kv_events=True, **spec)
    told = Told(engine)
    engine.add(PROMPT, max_tokens=1, **asked)
    engine.drain()
    engine.add(tokens(3, first=900), max_tokens=1)
    engine.drain()
    groups = range(len(engine.geometry.scheduler.kv_cache_groups))
    for medium, tier in (("CPU", Tier.DRAM), ("STORAGE", Tier.SSD)):
        blocks = told.tiers[medium]
        assert len(blocks) == len(set(blocks)) == len(engine.idle_objects(tier))
        compared = [block for block in blocks if block[:2] in told.own]
        assert {group for group, *_ in compared} == set(groups)
        assert compared == [told.own[block[:2]] for block in compared]
        assert [block for block in blocks if block[0] == 0] == [block for block in compared if block[0] == 0]
    assert {parent is None for _, _, parent, *_ in told.tiers["CPU"]} == {True, False}
    assert {name for *_, name in told.tiers["CPU"]} == {asked.get("lora")}
    sizes = {group.kv_cache_spec.block_size for group in engine.geometry.scheduler.kv_cache_groups}
    assert {size for *_, size, _, _ in told.tiers["CPU"]} == sizes
    engine.close()


@pytest.mark.statement("connector", 90)
def test_what_an_earlier_life_left_is_told_in_full_when_it_is_loaded(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    extra = {"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}
    earlier = make_umbp(extra)
    earlier.store(PROMPT)
    earlier.close()
    engine = make_umbp(extra, kv_events=True)
    told = Told(engine)
    loaded = engine.add([*PROMPT, 1], max_tokens=1)
    engine.drain()
    engine.add(tokens(3, first=900), max_tokens=1)
    engine.drain()
    assert engine.external_tokens(loaded) == len(PROMPT)
    assert sorted(told.tiers["CPU"]) == sorted(told.own.values())
    assert len(told.own) == 6
    engine.close()


@pytest.mark.statement("connector", 90)
def test_what_leaves_a_tier_is_named_as_it_came(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    engine = make_umbp({"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}, kv_events=True, groups=UNEVEN)
    told = Told(engine)
    engine.store(PROMPT)
    came = {medium: {(group, block) for group, block, *_ in blocks} for medium, blocks in told.tiers.items()}
    engine.scheduler.reset_connector_cache()
    engine.add(tokens(3, first=900), max_tokens=1)
    engine.drain()
    assert told.removed == came
    engine.close()
