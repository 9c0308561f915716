"""Messages about external hashes to the values of ``umbp_core`` and back."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from umbp_core.errors import InvalidRequest, ProtocolError
from umbp_core.index_feed import Change, ChangeKind, FeedPage
from umbp_core.index_gate import Acknowledgement, Action, ActionKind, Batch, Verdict
from umbp_core.index_match import PositionMatch, PrefixMatch, TierRun
from umbp_core.master.model import BlockPage, ExternalMatch, HashChange, HashExplanation, NodeStatus
from umbp_core.wire import messages, replies
from umbp_core.wire.columns import bitmap_bytes, pack_column, select, unpack_column, unpack_floats
from umbp_core.wire.hashes import EMPTY, pack_hashes, unpack_hashes
from umbp_core.wire.names import pack_names, pack_table, read_table, unpack_names

_EVENT_BYTES = 32
"""Of an event beside its changes, at most."""
_CHANGE_BYTES = 48
"""Of a change beside its names and hashes, at most."""
_LENGTH_BYTES = 2
"""Of a hash beside itself, at most."""
_CELL = struct.Struct("<Ii")
_RUN = struct.Struct("<iI")
_VERDICTS = {
    Verdict.APPLY: 1,
    Verdict.REPLAY: 2,
    Verdict.GAP: 3,
    Verdict.STALE: 4,
    Verdict.UNREGISTERED: 5,
}
_VERDICT_OF = {number: verdict for verdict, number in _VERDICTS.items()}


def matches_message(matches: Sequence[PositionMatch], address: Callable[[str], str]) -> replies.Matches:
    """The answer to ``Match``; ``address`` says where a node is."""
    if len(matches) == 1 and len(matches[0].tiers) == 1:  # the most frequent one
        node, tiers = matches[0]
        ((tier, bitmap),) = tiers.items()
        return replies.Matches(*pack_table((node,), (address(node),)), _CELL.pack(0, tier), bitmap)
    nodes, addresses, cells, bitmaps = [], [], [], []
    for number, (node, tiers) in enumerate(matches):
        nodes.append(node)
        addresses.append(address(node))
        for tier, bitmap in tiers.items():
            cells.append(_CELL.pack(number, tier))
            bitmaps.append(bitmap)
    return replies.Matches(*pack_table(tuple(nodes), tuple(addresses)), b"".join(cells), b"".join(bitmaps))


def matches_of(message: replies.Matches, hashes: Sequence[bytes]) -> list[ExternalMatch]:
    """What the answer to a match of ``hashes`` says.  Raises ``ProtocolError``.

    Lists of the same positions are one object; nobody may change them.
    """
    size = bitmap_bytes(len(hashes))
    cells, bitmaps = message.cells, message.bitmaps
    if len(cells) % _CELL.size or len(bitmaps) != len(cells) // _CELL.size * size:
        raise ProtocolError(f"an answer has {len(cells)} bytes of cells and {len(bitmaps)} of bitmaps of {size} bytes")
    table = read_table(message.nodes, message.addresses)
    if len(table) == 1 and len(cells) == _CELL.size:  # the most frequent one
        number, tier = _CELL.unpack(cells)
        if not number:
            return [ExternalMatch(*table[0], {tier: select(hashes, bitmaps)})]
    found = [ExternalMatch(node, address, {}) for node, address in table]
    lists: dict[bytes, list[bytes]] = {}
    at = 0
    for number, tier in _CELL.iter_unpack(cells):
        bitmap = bitmaps[at : at + size]
        at += size
        selected = lists.get(bitmap)
        if selected is None:
            selected = lists[bitmap] = select(hashes, bitmap)
        if number >= len(found):
            raise ProtocolError(f"an answer refers to node {number} of a table of {len(found)}")
        found[number].tiers[tier] = selected
    return found


def check_weights(weights: Mapping[int, float] | None) -> None:
    """Raises ``InvalidRequest`` when a weight is no cost: negative, infinite or not a number."""
    for tier, weight in (weights or {}).items():
        if not (math.isfinite(weight) and weight >= 0):
            raise InvalidRequest(f"tier {tier} has the weight {weight}; a cost is a number from 0 on")


def prefixes_message(matches: Sequence[PrefixMatch]) -> replies.Prefixes:
    """The answer to ``MatchPrefix``."""
    runs = [_RUN.pack(run.tier, run.length) for match in matches for run in match.runs]
    return replies.Prefixes(
        pack_names(tuple([match.node for match in matches])),
        pack_column("I", [match.length for match in matches]),
        pack_column("d", [match.cost for match in matches]),
        pack_column("I", [len(match.runs) for match in matches]),
        b"".join(runs),
    )


def prefixes_of(message: replies.Prefixes) -> list[PrefixMatch]:
    """What the answer to a match of a prefix says.  Raises ``ProtocolError``."""
    nodes = unpack_names(message.nodes)
    lengths = unpack_column("I", message.lengths, len(nodes))
    costs = unpack_floats(message.costs, len(nodes))
    counts = unpack_column("I", message.run_counts, len(nodes))
    if len(message.runs) != sum(counts) * _RUN.size:
        raise ProtocolError(f"an answer has {len(message.runs)} bytes of runs for {sum(counts)} of them")
    runs = iter([TierRun(tier, length) for tier, length in _RUN.iter_unpack(message.runs)])
    return [
        PrefixMatch(node, length, [next(runs) for _ in range(count)], cost)
        for node, length, cost, count in zip(nodes, lengths, costs, counts, strict=True)
    ]


def hit_counts_message(counts: Sequence[tuple[bytes, int]]) -> replies.HitCountsAnswer:
    """The answer to ``HitCounts``."""
    return replies.HitCountsAnswer(
        pack_hashes([key for key, _ in counts]), pack_column("Q", [count for _, count in counts])
    )


def hit_counts_of(message: replies.HitCountsAnswer) -> list[tuple[bytes, int]]:
    """What the answer to a question for hit counts says.  Raises ``ProtocolError``."""
    hashes = unpack_hashes(message.hashes)
    return list(zip(hashes, unpack_column("Q", message.counts, len(hashes)), strict=True))


def batch_message(node_id: str, batch: Batch) -> messages.ApplyBatch:
    """The request to apply ``batch``."""
    rows = [messages.ActionRow(action.kind, action.tier, pack_hashes(action.hashes)) for action in batch.actions]
    return messages.ApplyBatch(node_id, batch.incarnation, batch.seq, tuple(rows), batch.full_sync)


def action_of(row: messages.ActionRow, hashes: Sequence[bytes]) -> Action:
    """The action in ``row``, whose hashes were unpacked.  Raises ``ProtocolError`` when it is not known."""
    if row.kind not in ActionKind.__members__.values():
        raise ProtocolError(f"action {row.kind} is not known; 1 reports, 2 revokes, 3 clears")
    if row.kind == ActionKind.CLEAR and hashes:
        raise ProtocolError(f"an action that clears tier {row.tier} names {len(hashes)} hashes; it clears all")
    return Action(ActionKind(row.kind), row.tier, hashes)


def batch_of(message: messages.ApplyBatch, actions: Sequence[Action]) -> Batch:
    """The batch in a request, whose actions were read."""
    return Batch(message.incarnation, message.seq, actions, message.full_sync)


def acknowledgement_message(answer: Acknowledgement) -> replies.BatchAnswer:
    """The answer to ``ApplyBatch`` and ``Probe``."""
    return replies.BatchAnswer(_VERDICTS[answer.verdict], answer.incarnation, answer.acked, answer.request_full_sync)


def acknowledgement_of(message: replies.BatchAnswer) -> Acknowledgement:
    """What the answer says.  Raises ``ProtocolError``."""
    verdict = _VERDICT_OF.get(message.verdict)
    if verdict is None:
        raise ProtocolError(f"verdict {message.verdict} on a batch is not known")
    return Acknowledgement(verdict, message.incarnation, message.acked, message.request_full_sync)


def blocks_message(page: BlockPage) -> replies.Blocks:
    """The answer to ``ListBlocks``."""
    return replies.Blocks(pack_hashes(page.hashes), page.cursor)


def blocks_of(message: replies.Blocks) -> BlockPage:
    """What the answer says.  Raises ``ProtocolError``."""
    return BlockPage(unpack_hashes(message.hashes), message.cursor)


def changes_message(page: FeedPage) -> replies.Changes:
    """An event of ``Watch``."""
    rows = [
        replies.ChangeRow(
            change.seq,
            change.kind,
            change.node,
            change.tier,
            pack_hashes(change.hashes) if change.hashes else EMPTY,
            change.reason,
        )
        for change in page.changes
    ]
    return replies.Changes(page.incarnation, page.cursor, page.lost, tuple(rows))


def part_of(page: FeedPage, told: int, limit: int) -> tuple[FeedPage, int]:
    """The beginning of ``page`` that an event of at most ``limit`` bytes has room for.

    ``told`` hashes of its first change were told before.  A change that is too large for an event of its own is told in
    several: the cursor is that of the last change that is told wholly, and also returned is how many hashes of the next
    one are told by then.  When not even one hash fits, or a change that names none, there are no changes.
    """
    room = limit - _EVENT_BYTES
    changes: list[Change] = []
    cursor = page.cursor - len(page.changes)
    for change in page.changes:
        hashes = change.hashes[told:]
        room -= _CHANGE_BYTES + len(change.node.encode()) + len(change.reason.encode())
        needed = sum(map(len, hashes)) + _LENGTH_BYTES * len(hashes)
        if needed > room:
            count = 0 if changes else _fitting(hashes, room)
            if count:
                changes.append(replace(change, hashes=hashes[:count]))
                told += count
            break
        changes.append(replace(change, hashes=hashes) if told else change)
        room -= needed
        cursor, told = change.seq, 0
    return FeedPage(page.incarnation, changes, cursor, lost=False), told


def _fitting(hashes: Sequence[bytes], room: int) -> int:
    """How many hashes, of more than fit, fit ``room`` bytes."""
    count = 0
    for one in hashes:
        room -= len(one) + _LENGTH_BYTES
        if room < 0:
            break
        count += 1
    return count


def changes_of(message: replies.Changes) -> FeedPage:
    """What an event says; ``at`` of its changes is 0, since clocks are not shared.  Raises ``ProtocolError``."""
    return FeedPage(
        message.incarnation, [_change_of(row) for row in message.changes], message.cursor, lost=message.lost
    )


def _change_of(row: replies.ChangeRow) -> Change:
    if row.kind not in ChangeKind.__members__.values():
        raise ProtocolError(f"change {row.kind} is not known; 1 is reported, 2 revoked, 3 cleared")
    hashes = tuple(unpack_hashes(row.hashes))
    return Change(row.seq, ChangeKind(row.kind), row.node_id, row.tier, hashes, 0.0, row.reason)


def explanation_message(explanation: HashExplanation) -> replies.Explained:
    """The answer to ``Explain``."""
    rows = [
        replies.ExplainedChange(change.tier, change.kind, change.age, change.reason) for change in explanation.changes
    ]
    return replies.Explained(explanation.node_id, explanation.status, explanation.tiers, tuple(rows), explanation.text)


def explanation_of(message: replies.Explained) -> HashExplanation:
    """What the answer says."""
    changes = [HashChange(row.tier, row.kind, row.age, row.reason) for row in message.changes]
    status = NodeStatus(message.status) if message.status in NodeStatus.__members__.values() else NodeStatus.UNKNOWN
    return HashExplanation(message.node_id, status, message.tiers, tuple(changes), message.text)
