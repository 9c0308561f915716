"""Every message says what it was made from: out of values, over the wire, into equal values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.wire import values
from umbp_core.errors import InvalidRequest, ProtocolError
from umbp_core.index_feed import Change, FeedPage
from umbp_core.index_gate import Batch
from umbp_core.index_match import PositionMatch, PrefixMatch
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import (
    BlockPage,
    ExternalMatch,
    GetRoute,
    HashExplanation,
    Heartbeat,
    HeartbeatReply,
    NodeInfo,
    NodeStatus,
    PutRoute,
    Registration,
)
from umbp_core.master.samples import MetricSample
from umbp_core.wire import messages, replies, values_index, values_nodes
from umbp_core.wire.codec import decode_as, decode_request, encode
from umbp_core.wire.columns import pack_column, unpack_bitmap
from umbp_core.wire.hashes import PART, Packing, pack_hashes, unpack_hashes
from umbp_core.wire.messages import Message
from umbp_core.wire.names import pack_names

M = TypeVar("M", bound=Message)


def sent(request: M) -> M:
    """What a server gets."""
    received = decode_request(encode(request))
    assert received == request
    return received  # type: ignore[return-value]


def answered(reply: M) -> M:
    """What a client gets."""
    return decode_as(type(reply), encode(reply))


@given(values.REGISTRATIONS)
def test_registrations(registration: Registration) -> None:
    assert values_nodes.registration_of(sent(values_nodes.registration_message(registration))) == registration


@given(values.HEARTBEATS)
def test_heartbeats(heartbeat: Heartbeat) -> None:
    message = sent(values_nodes.heartbeat_message(heartbeat))
    bundles = [
        Bundle(row.seq, tuple(delta for part in values_nodes.deltas_in_parts(row) for delta in part))
        for row in message.bundles
    ]
    assert values_nodes.heartbeat_of(message, bundles) == heartbeat


@pytest.mark.parametrize(
    ("key", "mode"),
    [
        (lambda _: b"", Packing.SEPARATED),
        (lambda n: b"\0%07d" % n, Packing.FIXED),
        (lambda n: b"\0" * (n % 3), Packing.LENGTHS),
    ],
)
def test_large_bundles_come_in_parts(key: Callable[[int], bytes], mode: Packing) -> None:
    """However their keys are packed: all of a part is worked on without letting others in."""
    deltas = [Delta(key(n), n % 3, None if n % 2 else n) for n in range(2 * PART + 1)]
    (row,) = values_nodes.heartbeat_message(Heartbeat("n", (Bundle(1, tuple(deltas)),))).bundles
    assert row.keys[0] == mode
    parts = list(values_nodes.deltas_in_parts(row))
    assert [delta for part in parts for delta in part] == deltas
    assert [len(part) for part in parts] == [PART, PART, 1]


@given(values.HEARTBEAT_REPLIES)
def test_heartbeat_replies(reply: HeartbeatReply) -> None:
    assert values_nodes.heartbeat_reply_of(answered(values_nodes.heartbeat_answer(reply))) == reply


@given(values.HASHES, values.TAGS)
def test_route_put(keys: list[bytes], exclude: tuple[str, ...]) -> None:
    sizes = list(range(len(keys)))
    message = sent(values_nodes.route_put_message("n", keys, sizes, exclude))
    assert (message.node_id, unpack_hashes(message.keys), message.exclude) == ("n", keys, exclude)
    assert values_nodes.sizes_of(message) == sizes


@given(values.PUT_ROUTES)
def test_put_routes(routes: list[PutRoute]) -> None:
    assert values_nodes.put_routes_of(answered(values_nodes.put_routes_message(routes)), len(routes)) == routes


@given(values.GET_ROUTES)
def test_get_routes(routes: list[GetRoute | None]) -> None:
    assert values_nodes.get_routes_of(answered(values_nodes.get_routes_message(routes)), len(routes)) == routes


@given(values.SAMPLES)
def test_metrics(samples: list[MetricSample]) -> None:
    message = sent(values_nodes.metrics_message("n", samples))
    assert (message.node_id, values_nodes.samples_of(message)) == ("n", samples)


@given(values.NODES)
def test_nodes(nodes: list[NodeInfo]) -> None:
    assert values_nodes.nodes_of(answered(values_nodes.nodes_message(nodes))) == nodes


@given(values.positions())
def test_matches(query: tuple[list[bytes], list[PositionMatch]]) -> None:
    hashes, matches = query
    message = answered(values_index.matches_message(matches, lambda node: node + ":1"))
    assert values_index.matches_of(message, hashes) == [
        ExternalMatch(
            match.node,
            match.node + ":1",
            {
                tier: [key for key, held in zip(hashes, unpack_bitmap(bitmap, len(hashes)), strict=True) if held]
                for tier, bitmap in match.tiers.items()
            },
        )
        for match in matches
    ]


@given(values.PREFIXES)
def test_prefixes(prefixes: list[PrefixMatch]) -> None:
    assert values_index.prefixes_of(answered(values_index.prefixes_message(prefixes))) == prefixes


@given(values.HIT_COUNTS)
def test_hit_counts(counts: list[tuple[bytes, int]]) -> None:
    assert values_index.hit_counts_of(answered(values_index.hit_counts_message(counts))) == counts


@given(values.BATCHES)
def test_batches(batch: Batch) -> None:
    message = sent(values_index.batch_message("n", batch))
    actions = [values_index.action_of(row, unpack_hashes(row.hashes)) for row in message.actions]
    assert (message.node_id, values_index.batch_of(message, actions)) == ("n", batch)


@given(values.ACKNOWLEDGEMENTS)
def test_acknowledgements(answer: Any) -> None:
    assert values_index.acknowledgement_of(answered(values_index.acknowledgement_message(answer))) == answer


@given(values.PAGES)
def test_pages(page: BlockPage) -> None:
    assert values_index.blocks_of(answered(values_index.blocks_message(page))) == page


@given(values.FEED_PAGES)
def test_feed_pages(page: FeedPage) -> None:
    assert values_index.changes_of(answered(values_index.changes_message(page))) == page


@given(st.lists(values.CHANGES, min_size=1, max_size=8), st.integers(0, 2**62), st.integers(0, 500))
def test_a_page_is_told_in_events_of_any_bound(changes: list[Change], start: int, limit: int) -> None:
    """Each within it, all of them the page; who goes on from the cursor of one of them misses nothing."""
    numbered = [replace(change, seq=start + number) for number, change in enumerate(changes, 1)]
    cursor, last, told = start, start + len(changes), 0
    heard: dict[int, tuple[bytes, ...]] = {}
    while cursor < last:
        page = FeedPage(7, numbered[cursor - start :], last, lost=False)
        part, told = values_index.part_of(page, told, limit)
        if not part.changes:
            assert limit < 256, "any of these changes could have been told"
            return
        assert len(encode(values_index.changes_message(part))) <= limit
        for change in part.changes:
            assert replace(change, hashes=()) == replace(numbered[change.seq - start - 1], hashes=())
            heard[change.seq] = heard.get(change.seq, ()) + change.hashes
        assert (part.incarnation, part.lost) == (7, False)
        assert part.cursor >= cursor
        cursor = part.cursor
        assert all(heard[change.seq] == change.hashes for change in numbered if change.seq <= cursor)
        assert told == (len(heard[cursor + 1]) if cursor + 1 in heard else 0)
    assert list(heard) == [change.seq for change in numbered]


@given(values.EXPLANATIONS)
def test_explanations(explanation: HashExplanation) -> None:
    assert values_index.explanation_of(answered(values_index.explanation_message(explanation))) == explanation


def test_a_status_that_is_not_known_explains_nothing_about_the_node() -> None:
    assert values_index.explanation_of(replies.Explained("n", 9, (), (), "")).status is NodeStatus.UNKNOWN


ROW = messages.BundleRow(5, b"\0", pack_column("i", [2]), pack_column("Q", [7]), pack_hashes([b"k"]))
ONE = pack_names(("a",))
HALF_ANSWERS: dict[str, Callable[[], object]] = {
    "more kinds than keys": lambda: deltas(kinds=b"\0\0"),
    "a kind of event that is not known": lambda: deltas(kinds=b"\2"),
    "one of many kinds": lambda: deltas(
        kinds=bytes(PART) + b"\2",
        keys=pack_hashes([b"k"] * (PART + 1)),
        tiers=bytes(4 * PART + 4),
        sizes=bytes(8 * PART + 8),
    ),
    "fewer tiers than keys": lambda: deltas(tiers=b""),
    "more sizes than keys": lambda: deltas(sizes=bytes(16)),
    "keys that are none": lambda: deltas(keys=b"?"),
    "a status of a node": lambda: values_nodes.heartbeat_reply_of(replies.HeartbeatAnswer(9, 0, False)),
    "fewer sizes than keys": lambda: values_nodes.sizes_of(messages.RoutePut("n", pack_hashes([b"k"]), b"")),
    "an outcome": lambda: values_nodes.put_routes_of(replies.PutRoutes(ONE, ONE, b"\3", bytes(4), bytes(4)), 1),
    "fewer outcomes": lambda: values_nodes.put_routes_of(replies.PutRoutes(ONE, ONE, b"", bytes(4), bytes(4)), 1),
    "a node out of the table": lambda: values_nodes.get_routes_of(
        replies.GetRoutes(ONE, ONE, pack_column("I", [2]), bytes(4), bytes(8)), 1
    ),
    "a table without addresses": lambda: values_nodes.get_routes_of(
        replies.GetRoutes(ONE, pack_names(()), bytes(4), bytes(4), bytes(8)), 1
    ),
    "an action": lambda: values_index.action_of(messages.ActionRow(4, 2, b""), []),
    "a clear with hashes": lambda: values_index.action_of(messages.ActionRow(3, 2, b""), [b"h"]),
    "a verdict": lambda: values_index.acknowledgement_of(replies.BatchAnswer(6, 0, 0, False)),
    "half a cell": lambda: matches_of(bytes(7), b""),
    "a cell without a bitmap": lambda: matches_of(bytes(8), b""),
    "a bitmap without a cell": lambda: matches_of(b"", b"\1"),
    "a cell of no node": lambda: matches_of(b"\1" + bytes(7), b"\1"),
    "a bitmap of more": lambda: matches_of(bytes(8), b"\2"),
    "fewer lengths than nodes": lambda: prefixes_of(lengths=b""),
    "fewer costs than nodes": lambda: prefixes_of(costs=bytes(7)),
    "fewer counts than nodes": lambda: prefixes_of(run_counts=b""),
    "fewer runs than counted": lambda: prefixes_of(run_counts=pack_column("I", [2])),
    "fewer counters than hashes": lambda: values_index.hit_counts_of(replies.HitCountsAnswer(pack_hashes([b"h"]), b"")),
    "a change": lambda: values_index.changes_of(
        replies.Changes(1, 1, False, (replies.ChangeRow(1, 4, "n", 2, pack_hashes([])),))
    ),
}


def deltas(**fields: bytes) -> object:
    row = {name: getattr(ROW, name) for name in ROW.__struct_fields__} | fields
    return list(values_nodes.deltas_in_parts(messages.BundleRow(**row)))


def matches_of(cells: bytes, bitmaps: bytes) -> object:
    return values_index.matches_of(replies.Matches(ONE, ONE, cells, bitmaps), [b"h"])


def prefixes_of(**fields: bytes) -> object:
    good = {"lengths": bytes(4), "costs": bytes(8), "run_counts": pack_column("I", [1]), "runs": bytes(8)}
    return values_index.prefixes_of(replies.Prefixes(nodes=ONE, **(good | fields)))


def test_the_good_ones_are_good() -> None:
    rows = deltas()
    assert isinstance(rows, list)
    assert len(rows) == 1
    assert matches_of(bytes(8), b"\1") == [ExternalMatch("a", "a", {0: [b"h"]})]
    prefixes = prefixes_of()
    assert isinstance(prefixes, list)
    assert len(prefixes) == 1


@pytest.mark.parametrize("read", HALF_ANSWERS.values(), ids=HALF_ANSWERS)
def test_what_does_not_fit_together_is_refused(read: Callable[[], object]) -> None:
    with pytest.raises(ProtocolError):
        read()


@pytest.mark.parametrize("weight", [-0.5, float("inf"), float("nan")])
def test_weights_are_costs(weight: float) -> None:
    values_index.check_weights({1: 0.0, 2: 2.5})
    values_index.check_weights(None)
    with pytest.raises(InvalidRequest, match="tier 2 has the weight"):
        values_index.check_weights({2: weight})
