"""Corners of the leader's part of a daemon's pool that a whole engine meets by chance only."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from umbp_connectors.daemon.messages import LENT
from umbp_connectors.daemon.pages import DaemonArena, NewObject, Place
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest
from umbp_core.tiers import Tier
from umbp_vllm.host_line import HostLine, RankStripes
from umbp_vllm.host_pool import HostPool
from umbp_vllm.host_words import Attached, Cleared, Lent, PublishAll, Published, Taken, There
from umbp_vllm.known_keys import KnownKeys
from umbp_vllm.metadata import StepMetadata
from umbp_vllm.stats import UmbpStats

SUM = b"c" * 16


class Script:
    """Stands for the thread that talks: answers are the test's."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.answers: deque[Any] = deque()

    def open(self) -> None:
        """Nothing to start."""

    def say(self, order: Any) -> None:
        self.said.append(order)

    def take(self) -> Any:
        return self.answers.popleft() if self.answers else None


def arena(name: bytes, **known: Any) -> DaemonArena:
    """A daemon's answer to a greeting."""
    return DaemonArena(name * 16, 512, 4096, 1, 30.0, 32, **known)


def pool_of(script: Script, now: list[float]) -> HostPool:
    """A pool whose only rank has the arena ``a`` mapped."""
    line = HostLine(script, [b"a" * 16], lambda: now[0], UmbpStats(data={}))  # type: ignore[arg-type]
    pool = HostPool(line, RankStripes((0,), (0,)), 4096)
    script.answers.append(Attached(1, arena(b"a")))
    script.answers.append(Taken(1, [1, 2, 3]))
    pool.take_answers()
    return pool


def op_of(op_id: str, direction: Direction) -> LeaderTransferRequest:
    """An op of one block."""
    return LeaderTransferRequest(op_id, "", direction, (BlockCopy(b"k", 0, 1, 1),))


def lend(pool: HostPool, key: bytes, life: int, until: float) -> None:
    """Put ``key`` on loan, held by nobody but whom the test lets pin it."""
    place = Place(LENT.index(GetStatus.DRAM), 9, 100, SUM)
    pool.loans.install(Lent(1, life, (7,), [(key, place)], until))


def test_an_op_that_was_planned_before_the_arena_changed_is_refused_by_every_rank() -> None:
    script, now = Script(), [100.0]
    pool = pool_of(script, now)
    lend(pool, b"k", 1, 130.0)
    pool.pin("load", [b"k"])
    assert pool.reserve_many("store", [(b"n", 100, 0)], Tier.DRAM) == [(1,)]
    metadata = StepMetadata(1, ops=[op_of("load", Direction.LOAD), op_of("store", Direction.STORE)])
    pool.stamp(metadata)
    assert metadata.until == {"load": 124.0}
    script.answers.append(Attached(2, arena(b"b")))
    pool.take_answers()
    pool.stamp(metadata)
    assert metadata.arena == b"b" * 16
    assert metadata.until == {"load": 0.0, "store": 0.0}


def test_a_match_is_not_begun_when_a_third_of_its_lease_is_over() -> None:
    script, now = Script(), [100.0]
    pool = pool_of(script, now)
    lend(pool, b"k", 1, 130.0)
    pool.pin("op", [b"k"])
    assert pool.count_prefix([b"k"]) == 1
    now[0] = 110.0
    pool.loans.expire(now[0])
    assert pool.count_prefix([b"k"]) == 0
    assert pool.loans.stale("op")


@pytest.mark.parametrize("answered_first", [True, False], ids=["before", "after"])
def test_what_was_asked_for_before_a_reset_is_matched_no_more(answered_first: bool) -> None:
    """The daemon lent it, then forgot it; whether the leader hears of the loan before it resets, or afterwards."""
    script, now = Script(), [100.0]
    pool = pool_of(script, now)

    def install(answer: There | Lent) -> None:
        assert isinstance(answer, Lent)
        pool.loans.install(answer)

    pool.on_answer = install
    pool.loans.ask(5, [b"k"], 110.0)
    place = Place(LENT.index(GetStatus.DRAM), 9, 100, SUM)
    script.answers.append(Lent(5, 1, (7,), [(b"k", place)], 130.0))
    if answered_first:
        pool.take_answers()
        assert pool.count_prefix([b"k"]) == 1
    pool.clear(Tier.DRAM)
    script.answers.append(Cleared())
    pool.take_answers()
    assert pool.line.usable
    assert pool.count_prefix([b"k"]) == 0
    assert b"k" not in pool.line.known


def test_pages_that_a_broken_connection_has_left_are_used_again_but_not_those_under_way() -> None:
    script, now = Script(), [100.0]
    pool = pool_of(script, now)
    pool.reserve_many("writing", [(b"w", 100, 0)], Tier.DRAM)
    pool.reserve_many("published", [(b"p", 100, 0)], Tier.DRAM)
    pool.commit_many("published", {b"p": SUM}, Tier.DRAM)
    script.answers.append(Attached(1, arena(b"a", known=True, taken=(1, 2, 3, 4))))
    pool.take_answers()
    assert len(pool.stock) == 2
    order = next(order for order in script.said if isinstance(order, PublishAll))
    assert order.objects == [NewObject(2, b"p", 100, 0, SUM)]
    script.answers.append(Published(1, order.objects, [PutStatus.PRESENT]))
    pool.take_answers()
    pool.abort_owner("writing")
    assert (len(pool.stock), pool.stock.pending) == (4, 0)


def test_what_was_written_for_an_arena_that_is_gone_is_not_published() -> None:
    script, now = Script(), [100.0]
    pool = pool_of(script, now)
    pool.reserve_many("store", [(b"n", 100, 0)], Tier.DRAM)
    script.answers.append(Attached(2, arena(b"b")))
    pool.take_answers()
    pool.commit_many("store", {b"n": SUM}, Tier.DRAM)
    pool.abort_owner("store")
    assert not [order for order in script.said if isinstance(order, PublishAll)]
    assert (len(pool.stock), pool.stock.pending) == (0, 0)


def test_checksums_of_ranks_and_stripes() -> None:
    mla = RankStripes((0, 0), (0,))
    assert mla.stored(b"a" * 16 + b"a" * 16) == b"a" * 16
    assert mla.expected(b"a" * 16) == b"a" * 32
    two = RankStripes((0, 1), (0, 1))
    assert two.stored(b"x" * 32) == two.expected(b"x" * 32) == b"x" * 32


def test_known_keys_are_bounded() -> None:
    known = KnownKeys(2)
    for key in (b"1", b"2", b"1", b"3"):
        known.add(key)
    assert [key in known for key in (b"1", b"2", b"3")] == [True, False, True]
    known.discard(b"1")
    assert len(known) == 1
