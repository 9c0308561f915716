"""Demotions DRAM to SSD: what is planned, pinned, published and given up."""

from __future__ import annotations

from umbp_connectors.leader.demotions import FAILURES_BEFORE_FENCE, FIRST_FENCE_S, DemotionQueue
from umbp_connectors.leader.op_ids import OpIds
from umbp_core.directory import Directory, TierSpace
from umbp_core.eviction import LruPolicy
from umbp_core.ops import LeaderTransferRequest
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier, TierSet


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Node:
    """A directory of four DRAM pages and ``slots`` SSD slots with a demotion queue."""

    def __init__(self, *, slots: int = 4, limit: int = 8, batch: int = 2, in_flight: int = 4) -> None:
        self.clock = Clock()
        self.directory = Directory(
            [
                TierSpace(Tier.DRAM, PageAllocator(1, [4]), LruPolicy()),
                TierSpace(Tier.SSD, PageAllocator(1, [slots]), LruPolicy()),
            ]
        )
        self.queue = DemotionQueue(
            self.directory,
            self.clock,
            limit=limit,
            timeout_s=1.0,
            batch=batch,
            in_flight=in_flight,
            new_op_id=OpIds(),
        )

    def store(self, *keys: bytes) -> None:
        for key in keys:
            assert self.directory.reserve("store", key, Tier.DRAM, 1) is not None
            self.directory.commit("store", key, Tier.DRAM, b"sum:" + key)
            self.queue.offer(key, 0, 0)

    def end(self, op: LeaderTransferRequest, failed: tuple[int, ...] = ()) -> None:
        self.queue.ended(op, failed)
        self.directory.abort_owner(op.op_id)
        self.directory.unpin(op.op_id)


def test_a_demoted_object_is_published_on_ssd_with_its_checksum_and_stays_in_dram() -> None:
    node = Node()
    node.store(b"a", b"b", b"c")
    ops = node.queue.plan()
    assert [[block.key for block in op.blocks] for op in ops] == [[b"a", b"b"], [b"c"]]
    assert node.directory.tiers_of(b"a") == TierSet.of(Tier.DRAM)
    for op in ops:
        node.end(op)
    copy = node.directory.copy(b"a", Tier.SSD)
    assert copy is not None
    assert copy.checksum == b"sum:a"
    assert node.directory.tiers_of(b"a") == TierSet.of(Tier.DRAM, Tier.SSD)


def test_the_dram_copy_is_pinned_while_it_is_being_written() -> None:
    node = Node()
    node.store(b"a")
    (op,) = node.queue.plan()
    node.store(b"b", b"c", b"d")
    assert node.directory.reserve("store", b"e", Tier.DRAM, 1) is not None
    assert node.directory.copy(b"a", Tier.DRAM) is not None
    node.end(op)
    assert node.directory.stats(Tier.DRAM).pinned == 0


def test_what_left_dram_or_is_on_ssd_already_is_not_planned() -> None:
    node = Node()
    node.store(b"a", b"b")
    node.directory.drop(b"a", Tier.DRAM)
    (op,) = node.queue.plan()
    node.end(op)
    node.queue.offer(b"b", 0, 0)
    assert node.queue.plan() == []
    assert len(node.queue) == 0


def test_failed_blocks_are_not_published_and_their_slots_come_back() -> None:
    node = Node()
    node.store(b"a", b"b")
    (op,) = node.queue.plan()
    node.end(op, failed=(0,))
    assert node.directory.tiers_of(b"a") == TierSet.of(Tier.DRAM)
    assert node.directory.tiers_of(b"b") == TierSet.of(Tier.DRAM, Tier.SSD)
    assert node.directory.stats(Tier.SSD).free_pages == 3


def test_bounds_hold_and_what_does_not_fit_is_counted() -> None:
    node = Node(limit=2)
    node.store(b"a", b"b", b"c")
    assert (len(node.queue), node.queue.dropped) == (2, 1)
    node = Node(in_flight=1, batch=1)
    node.store(b"a", b"b")
    assert len(node.queue.plan()) == 1
    assert node.queue.plan() == []


def test_a_dying_disk_is_left_alone_for_a_while() -> None:
    node = Node()
    for _ in range(FAILURES_BEFORE_FENCE):
        node.directory.clear(Tier.DRAM)
        node.store(b"a")
        (op,) = node.queue.plan()
        node.end(op, failed=(0,))
    assert node.queue.fenced
    node.store(b"b")
    assert node.queue.plan() == []
    node.clock.now += FIRST_FENCE_S
    assert not node.queue.fenced
    node.store(b"c")
    (op,) = node.queue.plan()
    node.end(op)
    assert node.directory.copy(b"c", Tier.SSD) is not None


def test_a_disk_that_hangs_is_left_alone_and_nobody_waits_for_it() -> None:
    node = Node(batch=1, in_flight=3)
    node.store(b"a", b"b", b"c", b"d")
    ops = node.queue.plan()
    assert (len(ops), len(node.queue), node.queue.has_work) == (3, 1, True)
    node.clock.now += 0.9
    assert node.queue.plan() == []
    assert (node.queue.overdue, node.queue.fenced, node.queue.has_work) == (0, False, True)
    node.clock.now += 0.1
    assert node.queue.plan() == []
    assert (node.queue.overdue, node.queue.fenced, node.queue.dropped) == (3, True, 1)
    node.clock.now += FIRST_FENCE_S
    node.queue.offer(b"d", 0, 0)
    assert node.queue.plan() == [], "what it was given first is not over"
    assert (len(node.queue), node.queue.fenced, node.queue.has_work) == (1, False, False)
    assert node.directory.stats(Tier.DRAM).pinned == 3
    node.end(ops[1])
    assert (node.queue.overdue, node.queue.has_work) == (2, True)
    assert node.directory.copy(b"b", Tier.SSD) is not None, "what arrives late is as good"
    (op,) = node.queue.plan()
    assert [block.key for block in op.blocks] == [b"d"]


def test_a_reset_publishes_nothing_of_what_was_in_flight() -> None:
    node = Node()
    node.store(b"a", b"b", b"c")
    ops = node.queue.plan()
    node.queue.void()
    node.directory.clear(Tier.DRAM)
    for op in ops:
        node.end(op)
    assert node.directory.stats(Tier.SSD).objects == 0
    assert node.directory.stats(Tier.SSD).free_pages == 4
    assert node.directory.stats(Tier.DRAM).free_pages == 4


def test_no_room_on_ssd_drops_the_object() -> None:
    node = Node(slots=1)
    node.store(b"a", b"b")
    (op,) = node.queue.plan()
    assert [block.key for block in op.blocks] == [b"a"]
    assert node.queue.dropped == 1
    node.end(op)
    assert node.directory.copy(b"a", Tier.SSD) is not None


def test_what_is_stored_again_after_a_reset_is_written_when_the_void_op_is_through() -> None:
    node = Node()
    node.store(b"a", b"b")
    (void,) = node.queue.plan()
    node.queue.void()
    node.directory.clear(Tier.DRAM)
    node.store(b"a", b"c")
    (op,) = node.queue.plan()
    assert [block.key for block in op.blocks] == [b"c"]
    assert b"a" in node.queue
    node.end(void)
    assert node.directory.tiers_of(b"a") == TierSet.of(Tier.DRAM)
    (again,) = node.queue.plan()
    node.end(again)
    node.end(op)
    assert node.directory.tiers_of(b"a") == node.directory.tiers_of(b"c") == TierSet.of(Tier.DRAM, Tier.SSD)
    assert node.queue.plan() == []
