"""What we read and write by hand is what protobuf reads and writes, whole or in pieces."""

from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tests.master.grpc.harness import message
from umbp_connectors.master import grpc_raw
from umbp_connectors.wire_grpc import codec, convert
from umbp_connectors.wire_grpc import messages as pb
from umbp_core.errors import InvalidRequest, ProtocolError
from umbp_core.index_match import NodeMatch
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import ExternalMatch, Heartbeat, Registration, TierCapacity
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample

T = TypeVar("T")

texts = st.text(max_size=8) | st.text("0123456789", min_size=17, max_size=20)
tiers = st.sampled_from([0, 1, 2, 3, 7, -1]) | st.integers(-(2**31), 2**31 - 1)
numbers = st.integers(0, 2**64 - 1)
hash_lists = st.lists(texts.map(str.encode), max_size=12)


def run(work: Coroutine[Any, Any, T]) -> tuple[T, int]:
    """What ``work`` returns, and how often it let others in."""
    breaths = 0
    while True:
        try:
            work.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result, breaths
        breaths += 1


# --- Matches.


@given(
    st.lists(
        st.tuples(texts, texts, st.dictionaries(tiers, hash_lists, max_size=4)), max_size=5, unique_by=lambda m: m[0]
    )
)
def test_matches_are_written_as_protobuf_writes_them(found: list[tuple[str, str, dict[int, list[bytes]]]]) -> None:
    addresses = {node: address for node, address, _ in found}
    matches = [NodeMatch(node, held) for node, _, held in found]
    data, _ = run(grpc_raw.write_matches(matches, addresses.__getitem__))
    part = message("TierHashes")
    expected = message("MatchExternalKvResponse")(
        matches=[
            message("ExternalKvNodeMatch")(
                node_id=node,
                peer_address=address,
                hashes_by_tier=[part(tier=tier, hashes=[h.decode() for h in held[tier]]) for tier in held],
            )
            for node, address, held in found
        ]
    )
    assert data == expected.SerializeToString()
    assert codec.read_matches(data) == [ExternalMatch(node, address, held) for node, address, held in found]


@given(st.lists(st.tuples(tiers, hash_lists, st.booleans()), max_size=12), st.sampled_from([b"", b"\x1a\x01x"]))
def test_buckets_are_read_alike_however_they_were_written(
    buckets: list[tuple[int, list[bytes], bool]], unknown: bytes
) -> None:
    """Tier first or last, with fields that nobody knows; the same hashes again and again."""
    node = b""
    for tier, hashes, tier_first in [*buckets, *buckets]:
        parts = [
            pb.TierHashes(tier=tier).SerializeToString(),
            pb.TierHashes(hashes=hashes).SerializeToString() + unknown,
        ]
        bucket = b"".join(parts if tier_first else reversed(parts))
        node += b"\x1a" + codec.encode_varint(len(bucket)) + bucket
    (found,) = codec.read_matches(b"\x0a" + codec.encode_varint(len(node)) + node)
    assert found.tiers == {tier: hashes for tier, hashes, _ in buckets}
    lists = list(found.tiers.values())
    assert len({id(hashes) for hashes in lists}) == len(lists), "each belongs to the caller alone"


@pytest.mark.parametrize("bucket", [b"\x08", b"\x08\xff", b"\x12\x05ab", b"\x08\x01\x12\x09x"])
def test_buckets_that_are_none_are_protocol_errors(bucket: bytes) -> None:
    node = b"\x1a" + codec.encode_varint(len(bucket)) + bucket
    with pytest.raises(ProtocolError):
        codec.read_matches(b"\x0a" + codec.encode_varint(len(node)) + node)


def test_lists_that_are_shared_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[object] = []

    def write(hashes: list[bytes]) -> bytes:
        written.append(hashes)
        return pb.TierHashes(hashes=hashes).SerializeToString()  # type: ignore[no-any-return]

    monkeypatch.setattr(grpc_raw, "encode_hashes", write)
    shared, own = [b"a", b"b"], [b"a"]
    matches = [NodeMatch("n1", {1: shared, 2: own}), NodeMatch("n2", {1: shared, 2: shared})]
    data, _ = run(grpc_raw.write_matches(matches, lambda _: ""))
    assert written == [shared, own]
    answer = message("MatchExternalKvResponse").FromString(data)
    assert [[[h.encode() for h in part.hashes] for part in match.hashes_by_tier] for match in answer.matches] == [
        [shared, own],
        [shared, shared],
    ]


def test_a_large_answer_lets_others_in() -> None:
    hashes = [b"%d" % number for number in range(5 * grpc_raw.SLICE)]
    data, breaths = run(grpc_raw.write_matches([NodeMatch("n", {1: hashes})], lambda _: ""))
    assert breaths == 4
    (match,) = codec.read_matches(data)
    assert match.tiers == {1: hashes}


# --- Pieces.

unknown_fields = st.sampled_from(
    [
        b"\xf8\x07\x01",
        b"\xfd\x07abcd",
        b"\xf9\x07abcdefgh",
        b"\xfa\x07\x03abc",
        b"\xfb\x07\x08\x01\xfc\x07",
        b"\x2b\x2b\x2c\x2c",
    ]
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A report, its fields in any order, several times, with fields that nobody knows; sometimes spoilt."""
    parts = draw(
        st.lists(
            st.one_of(
                texts.map(lambda text: pb.ReportExternalKvBlocksRequest(hashes=[text.encode()]).SerializeToString()),
                texts.map(lambda text: pb.ReportExternalKvBlocksRequest(node_id=text).SerializeToString()),
                tiers.map(lambda tier: pb.ReportExternalKvBlocksRequest(tier=tier).SerializeToString()),
                unknown_fields,
            ),
            max_size=12,
        )
    )
    data = bytearray(b"".join(parts))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def whole(message_class: Any, data: bytes) -> Any:
    try:
        return message_class.FromString(data)
    except DecodeError:
        return None


@given(requests(), st.integers(1, 5))
def test_a_message_in_pieces_is_the_same_message(data: bytes, piece_fields: int) -> None:
    expected = whole(pb.ReportExternalKvBlocksRequest, data)
    found = pb.ReportExternalKvBlocksRequest()
    try:
        pieces = list(codec.cut(data, piece_fields))
        for piece in pieces:
            codec.parse_more(found, piece)
    except ProtocolError:
        assert expected is None
        return
    assert b"".join(pieces) == data
    assert found == expected


@given(st.binary(max_size=40))
def test_any_bytes_are_cut_as_protobuf_reads_them(data: bytes) -> None:
    """Where protobuf sees a message, so do we; where we do not, it sees none either."""
    readable = whole(pb.UnregisterClientRequest, data) is not None
    try:
        fields = list(codec.fields(data))
    except ProtocolError:
        assert not readable
        return
    assert b"".join(data[field.start : field.end] for field in fields) == data


@pytest.mark.parametrize("depth", [1, 2, 50, 90, 1000])
def test_groups_are_passed_over_as_protobuf_does(depth: int) -> None:
    """Nobody uses them any more; field 15 starts one with 0x7b and ends it with 0x7c."""
    data = b"\x7b" * depth + b"\x12\x02xy\x08\x01" + b"\x7c" * depth
    if whole(pb.UnregisterClientRequest, data) is None:
        with pytest.raises(ProtocolError, match="deeper"):
            list(codec.fields(data))
    else:
        (field,) = codec.fields(data)
        assert (field.number, field.start, field.end) == (15, 0, len(data))


@pytest.mark.parametrize("data", [b"\x7b\x74", b"\x7b\x7c\x7c", b"\x7b", b"\x7b\x12\x05a\x7c", b"\x7e", b"\x7f"])
def test_groups_that_do_not_end_as_they_began_are_no_message(data: bytes) -> None:
    assert whole(pb.UnregisterClientRequest, data) is None
    with pytest.raises(ProtocolError):
        list(codec.fields(data))


def test_what_has_the_number_of_bundles_and_another_type_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    for whole_bytes in (grpc_raw.WHOLE, -1):
        monkeypatch.setattr(grpc_raw, "WHOLE", whole_bytes)
        assert run(grpc_raw.read_heartbeat(b"\x0a\x01n" + b"\x10\x05"))[0] == Heartbeat("n", [])


@pytest.mark.parametrize("data", [b"\x12\x05\x08\x01", b"\x0a\x01n\x12\x81\x01\x08\x01", b"\x12"])
def test_a_heartbeat_that_was_cut_on_its_way_is_none(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Even where what is left of its last bundle is one."""
    for whole_bytes in (grpc_raw.WHOLE, -1):
        monkeypatch.setattr(grpc_raw, "WHOLE", whole_bytes)
        with pytest.raises(ProtocolError):
            run(grpc_raw.read_heartbeat(data))


@pytest.mark.parametrize("size", [10, 200_000])
def test_large_requests_are_read_in_pieces(size: int) -> None:
    hashes = [b"%d" % number for number in range(size)]
    data = pb.ReportExternalKvBlocksRequest(node_id="n", hashes=hashes, tier=2).SerializeToString()
    request, breaths = run(grpc_raw.read(pb.ReportExternalKvBlocksRequest, data))
    items, more = run(grpc_raw.read_items(request.hashes, data))
    assert (request.node_id, request.tier, items) == ("n", 2, hashes)
    assert breaths >= size // grpc_raw.SLICE
    assert more == size // grpc_raw.SLICE


def test_what_is_wrong_at_the_end_of_a_large_request_is_seen() -> None:
    data = pb.ReportExternalKvBlocksRequest(hashes=[b"h%d" % number for number in range(200_000)]).SerializeToString()
    with pytest.raises(ProtocolError, match="middle"):
        run(grpc_raw.read(pb.ReportExternalKvBlocksRequest, data[:-1]))
    spoilt = data[:-1] + b"\xff"
    request, _ = run(grpc_raw.read(pb.ReportExternalKvBlocksRequest, spoilt))
    with pytest.raises(ProtocolError, match="UTF-8"):
        run(grpc_raw.read_items(request.hashes, spoilt))


# --- Values.

registrations = st.builds(
    Registration,
    texts,
    texts,
    texts,
    st.binary(max_size=8),
    st.lists(st.builds(TierCapacity, tiers, numbers, numbers), max_size=3).map(tuple),
    st.lists(texts, max_size=3).map(tuple),
)
deltas = st.builds(Delta, texts.map(str.encode), tiers, numbers | st.none())
heartbeats = st.builds(
    Heartbeat,
    texts,
    st.lists(st.builds(Bundle, numbers, st.lists(deltas, max_size=4).map(tuple)), max_size=4),
    st.booleans(),
    numbers,
    st.none() | st.lists(st.builds(TierCapacity, tiers, numbers, numbers), min_size=1, max_size=3).map(tuple),
    st.none() | st.dictionaries(tiers, numbers, min_size=1, max_size=3),
)
floats = st.floats(allow_nan=False)
samples = st.builds(
    MetricSample,
    texts,
    st.builds(CounterDelta, floats)
    | st.builds(GaugeValue, floats)
    | st.builds(
        HistogramDelta,
        st.lists(floats, max_size=3).map(tuple),
        st.lists(numbers, max_size=3).map(tuple),
        numbers,
        floats,
    ),
    texts,
    st.lists(st.tuples(texts, texts), max_size=2).map(tuple),
)


@given(registrations)
def test_registrations_come_back(registration: Registration) -> None:
    data = convert.registration_message(registration).SerializeToString()
    assert convert.registration_of(pb.RegisterClientRequest.FromString(data)) == registration


@given(heartbeats)
def test_heartbeats_come_back_whole_or_in_pieces(heartbeat: Heartbeat) -> None:
    data = convert.heartbeat_message(heartbeat).SerializeToString()
    assert run(grpc_raw.read_heartbeat(data))[0] == heartbeat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpc_raw, "WHOLE", -1)
        patch.setattr(grpc_raw, "SLICE", 2)
        patch.setattr(grpc_raw, "OBJECTS", 2)
        assert run(grpc_raw.read_heartbeat(data))[0] == heartbeat


def test_a_large_full_sync_lets_others_in() -> None:
    bundle = Bundle(1, tuple(Delta(b"key %d" % number, 2, number) for number in range(100_000)))
    heartbeat = Heartbeat("n", [bundle], True, 7)
    found, breaths = run(grpc_raw.read_heartbeat(convert.heartbeat_message(heartbeat).SerializeToString()))
    assert found == heartbeat
    assert breaths >= 100_000 // grpc_raw.SLICE + 100_000 // grpc_raw.OBJECTS


def test_many_small_things_let_others_in_too() -> None:
    many = 3 * grpc_raw.OBJECTS
    beat = Heartbeat("n", [Bundle(number, ()) for number in range(many)])
    data = convert.heartbeat_message(beat).SerializeToString()
    found, breaths = run(grpc_raw.read_heartbeat(data))
    assert (found, breaths) == (beat, 2)
    series = [MetricSample(f"m{number}", CounterDelta(1.0)) for number in range(many)]
    message = pb.ReportMetricsRequest.FromString(convert.metrics_message("n", series).SerializeToString())
    assert run(grpc_raw.read_samples(message.metrics)) == (series, 2)
    nodes = [NodeMatch(f"n{number}", {1: [b"h"]}) for number in range(many)]
    written, breaths = run(grpc_raw.write_matches(nodes, lambda _: ""))
    assert breaths == 2
    assert [match.node_id for match in codec.read_matches(written)] == [node.node for node in nodes]


@given(st.lists(samples, max_size=3))
def test_metrics_come_back(given_samples: list[MetricSample]) -> None:
    data = convert.metrics_message("n", given_samples).SerializeToString()
    assert convert.samples_of(pb.ReportMetricsRequest.FromString(data).metrics) == given_samples


def test_a_sample_without_value_is_left_out() -> None:
    assert convert.samples_of([pb.MetricSample(name="x")]) == []


@pytest.mark.parametrize("kind", [2, 3, -1])
def test_unknown_kinds_of_events_are_refused(kind: int) -> None:
    with pytest.raises(InvalidRequest, match=f"kind {kind}"):
        convert.deltas_of([pb.KvEvent(kind=kind, key=b"k")])
