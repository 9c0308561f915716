"""Heartbeats with what changed of a node's own blocks."""

from __future__ import annotations

from umbp_connectors.client.outbox import BlockOutbox
from umbp_core.journal import Delta, Journal
from umbp_core.master.model import HeartbeatReply, NodeStatus

DRAM = 2
LIFE = 9


def outbox(count: int) -> BlockOutbox:
    """One whose owner has ``count`` blocks; two bundles of two events per heartbeat."""
    blocks = [Delta(b"%d" % number, DRAM, number) for number in range(count)]
    return BlockOutbox("node", Journal(LIFE, 100, 2), lambda: blocks, bundles=2, events=2)


def answer(box: BlockOutbox) -> list[tuple[int, int]]:
    """Send what is due to a master that takes it; the numbers and sizes of its bundles."""
    message = box.compose()
    acked = max([message.baseline, *(bundle.seq for bundle in message.bundles)])
    box.receive(HeartbeatReply(NodeStatus.ALIVE, max(acked, box.journal.acked_seq)))
    return [(bundle.seq, len(bundle.deltas)) for bundle in message.bundles]


def test_a_large_full_sync_goes_on_in_ordinary_bundles() -> None:
    box = outbox(11)
    first = box.compose()
    assert (first.full_sync, first.baseline, first.incarnation) == (True, 1, LIFE)
    box.receive(HeartbeatReply(NodeStatus.ALIVE, 1))
    box.journal.record([Delta(b"new", DRAM, 1)])
    assert answer(box) == [(2, 2), (3, 2)]
    assert answer(box) == [(4, 2), (5, 1)]
    assert not box.settled
    assert answer(box) == [(6, 1)]
    assert (box.settled, answer(box)) == (True, [])


def test_a_full_sync_that_was_not_answered_begins_again_with_another_number() -> None:
    box = outbox(1)
    assert [box.compose().baseline, box.compose().baseline] == [1, 2]


def test_a_node_without_blocks_says_that_too() -> None:
    message = outbox(0).compose()
    assert (message.full_sync, message.baseline, message.bundles) == (True, 1, [])


def test_a_master_that_acknowledges_less_than_before_has_forgotten() -> None:
    box = outbox(3)
    answer(box)
    box.receive(HeartbeatReply(NodeStatus.ALIVE, 0))
    assert box.compose().full_sync


def test_a_muted_outbox_gives_signs_of_life_until_it_is_registered_again() -> None:
    box = outbox(3)
    box.mute()
    message = box.compose()
    assert (message.full_sync, message.bundles, box.settled) == (False, [], True)
    box.begin(LIFE)
    assert box.compose().full_sync
    box.begin(LIFE + 3)
    assert box.compose().incarnation == LIFE + 3
