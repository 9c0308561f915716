"""vLLM's own block pool beside our reading of it: random calls, and readings at any later moment."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.core.block_pool import BlockPool

from tests.vllm.harness.reported import in_all_groups
from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.tiers import Tier
from umbp_vllm import block_hooks
from umbp_vllm.groups import KvGroup
from umbp_vllm.hbm_watch import All, BlockLog, BlockMirror
from umbp_vllm.published import INT64, GroupWords, counting_groups

UNIT = 4
"""Tokens per hash; the groups' blocks are this long or twice as long."""


def group(index: int, units: int = 1, reach: int | None = None) -> KvGroup:
    return KvGroup(index, UNIT * units, units, reach, None, False)


SHAPES = {
    "one group": [group(0)],
    "one group of longer blocks": [group(0, 2)],
    "a window": [group(0), group(1, 1, reach=7)],
    "two full groups": [group(0), group(1)],
    "two full groups of two sizes": [group(0, 2), group(1), group(2, 1, reach=9)],
}


def request(stem: int, hashes: int = 12) -> Any:
    """What the block pool reads of a request."""
    return SimpleNamespace(block_hashes=[hashlib.sha256(b"%d %d" % (stem, index)).digest() for index in range(hashes)])


class Watched:
    """A block pool, what was noted of it, and what the words so far say that it holds."""

    def __init__(self, groups: list[KvGroup], blocks: int = 24) -> None:
        self.groups = groups
        self.pool = BlockPool(blocks, True, UNIT)
        assert block_hooks.cannot_watch(self.pool) is None
        self.log = BlockLog()
        block_hooks.watch_blocks(self.pool, self.log.note, lambda: self.log.note(All.EMPTIED))
        self.mirror = BlockMirror(self.pool, GroupWords(groups, INT64))
        self.held: set[bytes] = set()

    def read(self) -> None:
        self.apply(self.mirror.decode(self.log.take()))

    def resync(self) -> None:
        """What waits is replaced by the note that has everything read."""
        self.log.take()
        self.apply(self.mirror.decode([All.UNKNOWN]))

    def apply(self, words: Iterable[Word]) -> None:
        for kind, tier, hashes in words:
            assert tier is Tier.HBM
            assert len(hashes) == len(set(hashes))
            if kind is WordKind.ADD:
                self.held.update(hashes)
            elif kind is WordKind.REMOVE:
                self.held.difference_update(hashes)
            else:
                self.held = set(hashes)

    def truth(self) -> set[bytes]:
        cached = self.pool.cached_block_hash_to_block._cache
        return in_all_groups(cached, [each.index for each in counting_groups(self.groups)])


class WatchMachine(RuleBasedStateMachine):
    """Requests that take blocks, fill them, share them, free them; the reader comes whenever it likes."""

    @initialize(shape=st.sampled_from(sorted(SHAPES)))
    def start(self, shape: str) -> None:
        self.watched = Watched(SHAPES[shape])
        self.pool = self.watched.pool
        self.live: list[tuple[Any, KvGroup, list[Any], int]] = []

    @precondition(lambda self: self.pool.get_num_free_blocks() >= 4)
    @rule(stem=st.integers(0, 3), which=st.integers(0, 2), count=st.integers(1, 4), full=st.integers(0, 4))
    def take(self, stem: int, which: int, count: int, full: int) -> None:
        groups = self.watched.groups
        self.live.append((request(stem), groups[which % len(groups)], self.pool.get_new_blocks(count), 0))
        self.fill(len(self.live) - 1, full, masked=False)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9), count=st.integers(1, 4), masked=st.booleans())
    def fill(self, which: int, count: int, masked: bool) -> None:
        """Later blocks of a request become full, some of them not worth keeping."""
        number = which % len(self.live)
        asked, group, blocks, full = self.live[number]
        end = min(full + count, len(blocks))
        mask = [index % 2 == 0 for index in range(end - full)] if masked else None
        self.pool.cache_full_blocks(
            request=asked,
            blocks=blocks,
            num_cached_blocks=full,
            num_full_blocks=end,
            block_size=group.block_tokens,
            kv_cache_group_id=group.index,
            block_mask=mask,
        )
        self.live[number] = asked, group, blocks, end

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def fill_half(self, which: int) -> None:
        """The next block of a group with longer blocks is found by a shorter prefix too."""
        asked, group, blocks, full = self.live[which % len(self.live)]
        if group.hashes_per_block > 1 and full < len(blocks):
            self.pool.cache_partial_block(
                request=asked,
                block=blocks[full],
                num_tokens=full * group.block_tokens + UNIT,
                kv_cache_group_id=group.index,
                block_size=group.block_tokens,
            )

    @precondition(lambda self: self.live and self.pool.get_num_free_blocks() >= 1)
    @rule(which=st.integers(0, 9))
    def move(self, which: int) -> None:
        """Another block takes over what the first one is known for."""
        _, _, blocks, _ = self.live[which % len(self.live)]
        (copy,) = self.pool.get_new_blocks(1)
        self.pool.move_block_hashes(blocks[0], copy)
        self.pool.free_blocks([copy])

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def free(self, which: int) -> None:
        _, _, blocks, _ = self.live.pop(which % len(self.live))
        self.pool.free_blocks(reversed(blocks))

    @rule(numbers=st.sets(st.integers(1, 23), max_size=3))
    def evict(self, numbers: set[int]) -> None:
        self.pool.evict_blocks(numbers)

    @rule()
    def reset(self) -> None:
        assert self.pool.reset_prefix_cache() is not bool(self.live)

    @rule()
    def read(self) -> None:
        self.watched.read()
        assert self.watched.held == self.watched.truth()

    @rule()
    def resync(self) -> None:
        self.watched.resync()
        assert self.watched.held == self.watched.truth()

    @invariant()
    def nothing_is_read_that_was_never_cached(self) -> None:
        if hasattr(self, "watched"):
            assert len(self.watched.held) <= 4 * 12

    def teardown(self) -> None:
        if hasattr(self, "watched"):
            self.read()


WatchMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestWatchMachine = WatchMachine.TestCase


def test_reading_while_the_pool_goes_on_ends_with_the_truth() -> None:
    """The reader looks at blocks that the other thread changes at the same time; the last reading is right."""
    watched = Watched(SHAPES["two full groups of two sizes"], blocks=200)
    done = threading.Event()
    waiting: list[Any] = []

    def reader() -> None:
        while not done.is_set() or waiting:
            while waiting:
                watched.apply(watched.mirror.decode(waiting.pop(0)))

    thread = threading.Thread(target=reader)
    thread.start()
    for turn in range(1600):
        for each in watched.groups:
            blocks = watched.pool.get_new_blocks(5)
            asked = request(turn % 37)
            watched.pool.cache_full_blocks(asked, blocks, 0, 5, each.block_tokens, each.index)
            watched.pool.free_blocks(reversed(blocks))
            waiting.append(watched.log.take())
        if turn % 100 == 99:
            waiting.append([All.UNKNOWN])
        if turn % 250 == 249:
            assert watched.pool.reset_prefix_cache()
    done.set()
    thread.join(60)
    assert not thread.is_alive()
    watched.read()
    assert watched.held == watched.truth()
    assert len(watched.held) > 10


def test_an_entry_that_moves_is_known_by_its_new_block() -> None:
    """The old block lives on; when the new one is taken for something else, nobody serves the hash any more."""
    watched = Watched(SHAPES["one group"], blocks=4)
    pool = watched.pool
    (old,) = pool.get_new_blocks(1)
    pool.cache_full_blocks(request(1), [old], 0, 1, UNIT, 0)
    (new,) = pool.get_new_blocks(1)
    watched.read()
    pool.move_block_hashes(old, new)
    watched.read()
    assert watched.held == watched.truth()
    assert len(watched.held) == 1
    pool.free_blocks([new])
    pool.get_new_blocks(2)
    watched.read()
    assert watched.held == watched.truth() == set()


def test_a_block_that_is_found_by_a_shorter_prefix_too() -> None:
    watched = Watched(SHAPES["one group of longer blocks"], blocks=4)
    pool, asked = watched.pool, request(1)
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(asked, blocks, 0, 1, 2 * UNIT, 0)
    watched.read()
    assert len(watched.held) == 1
    for tokens in (3 * UNIT, UNIT):  # the first hash of a block, and one more of a block that has its own
        pool.cache_partial_block(asked, blocks[tokens // (2 * UNIT)], tokens, 0, 2 * UNIT)
        watched.read()
        assert watched.held == watched.truth()
    assert len(watched.held) == 3
    pool.evict_blocks({blocks[0].block_id})
    watched.read()
    assert watched.held == watched.truth()
    assert len(watched.held) == 1


def test_one_group_loses_what_another_gets_between_two_readings() -> None:
    watched = Watched(SHAPES["two full groups"], blocks=8)
    pool, asked = watched.pool, request(1)
    (first,) = pool.get_new_blocks(1)
    pool.cache_full_blocks(asked, [first], 0, 1, UNIT, 1)
    watched.read()
    pool.evict_blocks({first.block_id})
    (second,) = pool.get_new_blocks(1)
    pool.cache_full_blocks(asked, [second], 0, 1, UNIT, 0)
    watched.read()
    assert watched.held == watched.truth() == set()


@pytest.mark.parametrize("name", ["cache_full_blocks", "move_block_hashes", "get_new_blocks"])
def test_a_pool_of_another_kind_is_not_watched(name: str) -> None:
    pool = BlockPool(4, True, UNIT)
    setattr(pool, name, lambda anything, *others: None)
    reason = block_hooks.cannot_watch(pool)
    assert reason is not None
    assert name in reason
    setattr(pool, name, None)
    assert "has no" in str(block_hooks.cannot_watch(pool))


def test_a_pool_that_keeps_hashes_elsewhere_is_not_watched() -> None:
    pool = BlockPool(4, True, UNIT)
    del pool.cached_block_hashes_by_block
    assert "another way" in str(block_hooks.cannot_watch(pool))
