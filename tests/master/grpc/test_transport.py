"""Our client of UMBP's wire: values, deadlines, and the kinds of errors that it promises."""

import threading
from collections.abc import Callable
from concurrent import futures

import grpc
import pytest

from tests.master.grpc.harness import DEADLINE, DRAM, HBM, RunningMaster
from umbp_connectors.client.grpc_transport import GrpcTransport
from umbp_connectors.wire_grpc import messages as pb
from umbp_core.errors import (
    AccessDenied,
    AlreadyRegistered,
    InvalidRequest,
    MasterError,
    MasterUnavailable,
    ProtocolError,
)
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import (
    ExternalMatch,
    GetRoute,
    Heartbeat,
    HeartbeatReply,
    NodeStatus,
    PutOutcome,
    PutRoute,
    Registration,
    RegistrationAck,
    TierCapacity,
)
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample

N1 = Registration("n1", "10.0.0.1", "10.0.0.1:17000", b"\x00\xff", (TierCapacity(DRAM, 100, 90),), ("role=decode",))


@pytest.fixture
def transport(master: RunningMaster) -> GrpcTransport:
    return master.transport()


def test_a_node_lives_over_it(transport: GrpcTransport) -> None:
    assert not transport.native
    assert transport.register(N1, DEADLINE) == RegistrationAck(5000, 0)
    with pytest.raises(AlreadyRegistered, match="node is already alive"):
        transport.register(N1, DEADLINE)
    beat = Heartbeat("n1", [Bundle(1, (Delta(b"k", DRAM, 7), Delta(b"gone", DRAM, None)))])
    assert transport.heartbeat(beat, DEADLINE) == HeartbeatReply(NodeStatus.ALIVE, 1, False)
    assert transport.lookup([b"k", b"gone"], DEADLINE) == [True, False]
    assert transport.route_get("x", [b"no", b"k"], (), DEADLINE) == [None, GetRoute("n1", DRAM, 7, "10.0.0.1:17000")]
    assert transport.route_get("x", [b"k"], ["n1"], DEADLINE) == [None]
    assert transport.route_put("x", [b"k", b"new", b"large"], [7, 90, 91], (), DEADLINE) == [
        PutRoute(PutOutcome.ALREADY_EXISTS),
        PutRoute(PutOutcome.ROUTED, "n1", DRAM, "10.0.0.1:17000"),
        PutRoute(PutOutcome.UNAVAILABLE),
    ]
    transport.unregister("n1", DEADLINE)
    assert transport.heartbeat(Heartbeat("n1"), DEADLINE) == HeartbeatReply(NodeStatus.UNKNOWN)


def test_external_blocks_go_over_it(transport: GrpcTransport) -> None:
    transport.register(N1, DEADLINE)
    assert transport.report("n1", [b"a", b"b"], HBM, DEADLINE)
    assert transport.report("n1", [b"b"], DRAM, DEADLINE)
    assert transport.report("n1", [], DRAM, DEADLINE)
    transport.revoke("n1", [], DRAM, DEADLINE)
    assert transport.match([b"b", b"x", b"a"], True, DEADLINE) == [
        ExternalMatch("n1", "10.0.0.1:17000", {HBM: [b"b", b"a"], DRAM: [b"b"]})
    ]
    assert transport.hit_counts([b"x", b"b", b"a"], DEADLINE) == [(b"b", 1), (b"a", 1)]
    transport.revoke("n1", [b"a"], HBM, DEADLINE)
    transport.clear_tier("n1", DRAM, DEADLINE)
    assert transport.match([b"a", b"b"], False, DEADLINE)[0].tiers == {HBM: [b"b"]}
    transport.clear_node("n1", DEADLINE)
    assert transport.match([b"a", b"b"], False, DEADLINE) == []


def test_metrics_go_over_it_with_the_nodes_tags(master: RunningMaster, transport: GrpcTransport) -> None:
    transport.register(N1, DEADLINE)
    samples = [
        MetricSample("puts_total", CounterDelta(2.0), "Puts.", (("traffic", "local"),)),
        MetricSample("slots", GaugeValue(3.0)),
        MetricSample("seconds", HistogramDelta((0.1, 1.0), (1, 2), 3, 4.5)),
    ]
    transport.report_metrics("n1", samples, DEADLINE)
    assert master.observer.metrics == [("n1", ("role=decode",), samples)]


@pytest.mark.parametrize(
    "ask",
    [
        lambda t: t.register(Registration(""), DEADLINE),
        lambda t: t.report("", [b"a"], HBM, DEADLINE),
        lambda t: t.hit_counts([b"a"] * 4097, DEADLINE),
        lambda t: t.route_put("x", [b"a"], [1, 2], (), DEADLINE),
        lambda t: t.route_put("x", [b"a"], [-1], (), DEADLINE),
        lambda t: t.report("n1", [b"a"], 1 << 40, DEADLINE),
        lambda t: t.report("n1", [b"\xff"], HBM, DEADLINE),
        lambda t: t.match([b"\xff"], False, DEADLINE),
        lambda t: t.lookup([b"\xff"], DEADLINE),
        lambda t: t.heartbeat(Heartbeat("n1", [Bundle(1, (Delta(b"\xff", 1, 1),))]), DEADLINE),
        lambda t: t.match([b"x" * (1 << 20)] * 65, False, DEADLINE),
    ],
)
def test_what_cannot_be_asked_is_an_invalid_request(
    transport: GrpcTransport, ask: Callable[[GrpcTransport], object]
) -> None:
    with pytest.raises(InvalidRequest):
        ask(transport)
    assert transport.lookup([b"a"], DEADLINE) == [False]


def test_a_closed_transport_is_unavailable(transport: GrpcTransport) -> None:
    transport.close()
    transport.close()
    with pytest.raises(MasterUnavailable, match="connect again"):
        transport.lookup([b"a"], DEADLINE)


def test_nobody_there_is_unavailable() -> None:
    with pytest.raises(MasterUnavailable, match="is it running"):
        GrpcTransport.connect("127.0.0.1:1", 0.2)
    transport = GrpcTransport("127.0.0.1:1")
    with pytest.raises(MasterUnavailable):
        transport.lookup([b"a"], 2.0)
    transport.close()


def test_connecting_leaves_no_thread_behind(master: RunningMaster) -> None:
    """A thread that watches the connection would fall over its being closed at once."""
    master.transport()
    before = set(threading.enumerate())
    transport = master.transport()
    assert set(threading.enumerate()) <= before
    transport.close()


def test_a_connection_stands_also_where_nobody_tells_of_health() -> None:
    """The original has no such service."""
    with OddMaster(lambda _: pb.BatchLookupResponse(found=[True]).SerializeToString()) as transport:
        assert transport.lookup([b"a"], DEADLINE) == [True]


# --- A master that misbehaves.


class OddMaster:
    """Answers every call with ``answer``, or with what it raises."""

    def __init__(self, answer: Callable[[grpc.ServicerContext], bytes]) -> None:
        self._answer = answer
        self._pool = futures.ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool)
        names = [method.name for method in pb.pool_of(pb.files()).FindServiceByName(pb.MASTER_SERVICE).methods]
        handlers = {name: grpc.unary_unary_rpc_method_handler(lambda _, context: answer(context)) for name in names}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(pb.MASTER_SERVICE, handlers),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> GrpcTransport:
        self._server.start()
        self._transport = GrpcTransport.connect(f"127.0.0.1:{self.port}", DEADLINE)
        return self._transport

    def __exit__(self, *_exception: object) -> None:
        self._transport.close()
        self._server.stop(0).wait(DEADLINE)
        self._pool.shutdown()


def test_a_master_that_hangs_costs_the_deadline() -> None:
    over = threading.Event()

    def hang(_context: grpc.ServicerContext) -> bytes:
        over.wait(DEADLINE)
        return b""

    with OddMaster(hang) as transport:
        with pytest.raises(MasterUnavailable, match="DEADLINE_EXCEEDED"):
            transport.match([b"a"], False, 0.1)
        over.set()


def test_closing_ends_calls_under_way() -> None:
    over, entered = threading.Event(), threading.Event()

    def hang(_context: grpc.ServicerContext) -> bytes:
        entered.set()
        over.wait(DEADLINE)
        return b""

    failures: list[MasterError] = []

    def ask(transport: GrpcTransport) -> None:
        try:
            transport.match([b"a"], False, DEADLINE)
        except MasterError as error:
            failures.append(error)

    with OddMaster(hang) as transport:
        thread = threading.Thread(target=ask, args=(transport,))
        thread.start()
        assert entered.wait(DEADLINE)
        transport.close()
        thread.join(DEADLINE)
        over.set()
    assert [type(failure) for failure in failures] == [MasterUnavailable]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, MasterUnavailable),
        (grpc.StatusCode.PERMISSION_DENIED, AccessDenied),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, ProtocolError),
        (grpc.StatusCode.INTERNAL, ProtocolError),
    ],
)
def test_statuses_become_kinds_of_errors(code: grpc.StatusCode, kind: type[MasterError]) -> None:
    with OddMaster(lambda context: context.abort(code, "because")) as transport, pytest.raises(kind) as caught:
        transport.lookup([b"a"], DEADLINE)
    assert type(caught.value) is kind
    for part in ("because", code.name, "BatchLookup"):
        assert part in str(caught.value)


NONSENSE = [
    b"\xff\xff",
    pb.BatchLookupResponse(found=[True, True]).SerializeToString(),
    pb.BatchRouteGetResponse(node_ref=[1], tier=[1], size=[1]).SerializeToString(),
]


@pytest.mark.parametrize("answer", NONSENSE)
def test_answers_that_make_no_sense_are_protocol_errors(answer: bytes) -> None:
    with OddMaster(lambda _: answer) as transport:
        for ask in (
            lambda: transport.lookup([b"a", b"b", b"c"], DEADLINE),
            lambda: transport.route_get("x", [b"a"], (), DEADLINE),
            lambda: transport.route_put("x", [b"a", b"b", b"c"], [1, 1, 1], (), DEADLINE),
        ):
            with pytest.raises(ProtocolError):
                ask()


def test_numbers_that_nobody_named_yet_are_read_as_nothing_special() -> None:
    with OddMaster(lambda _: pb.HeartbeatResponse(status=9, acked_seq=4).SerializeToString()) as transport:
        assert transport.heartbeat(Heartbeat("n1"), DEADLINE) == HeartbeatReply(NodeStatus.UNKNOWN, 4)
    entry = pb.BatchRoutePutEntry(outcome=9)
    with OddMaster(lambda _: pb.BatchRoutePutResponse(entries=[entry]).SerializeToString()) as transport:
        assert transport.route_put("x", [b"a"], [1], (), DEADLINE) == [PutRoute(PutOutcome.UNAVAILABLE)]
