"""The door itself: health, reflection, ports, stopping."""

import asyncio
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.master.grpc.harness import DEADLINE, SIZES, Clock, Memory, Recorder, RunningMaster, Stub
from umbp_connectors.master import grpc_server
from umbp_connectors.master.grpc_server import GrpcServer
from umbp_connectors.master.service import MasterService
from umbp_core.errors import ConfigError, MasterUnavailable
from umbp_core.master.model import MasterSettings
from umbp_core.master.state import MasterState

T = TypeVar("T")
SERVING = health_pb2.HealthCheckResponse.SERVING


def door(address: str) -> GrpcServer:
    observer = Recorder()
    state = MasterState(MasterSettings(), random.Random(1))
    return GrpcServer(MasterService(state, clock=Clock(), store=Memory(), observer=observer), observer, address)


def test_health(master: RunningMaster) -> None:
    with grpc.insecure_channel(master.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "umbp.UMBPMaster"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(request, timeout=DEADLINE).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="umbp.UMBPPeer"), timeout=DEADLINE)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_says_when_the_master_stops() -> None:
    with RunningMaster() as master, grpc.insecure_channel(master.target) as channel:
        seen = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
        assert next(seen).status == SERVING
        stopping = master.begin(master.door.stop(DEADLINE))
        assert next(seen).status == health_pb2.HealthCheckResponse.NOT_SERVING
        seen.cancel()
        stopping.result(DEADLINE)


def test_reflection_describes_every_service(master: RunningMaster) -> None:
    with grpc.insecure_channel(master.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "umbp.UMBPMaster",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        file = database.FindFileContainingSymbol("umbp.UMBPMaster")
        (service,) = file.service
        assert len(service.method) == 15
        (hashes, _) = next(m for m in file.message_type if m.name == "MatchExternalKvRequest").field
        assert (hashes.name, hashes.type) == ("hashes", hashes.TYPE_STRING)
        assert database.FindFileContainingSymbol("grpc.health.v1.Health").name.endswith("health.proto")


def test_a_second_master_on_the_port_is_refused(master: RunningMaster, call: Stub) -> None:
    with pytest.raises(ConfigError, match=r"another master"), RunningMaster(address=master.target):
        pass
    call("RegisterClient", node_id="n1")


def test_grpc_shares_the_port_with_nobody_who_comes_between(
    master: RunningMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "check_free", lambda *_: None)
    with pytest.raises(ConfigError, match="cannot listen for gRPC"), RunningMaster(address=master.target):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_of_another_program_is_refused(host: str) -> None:
    """Also where gRPC would be content with what is left of a name's addresses."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            asyncio.run(door(f"{host}:{port}").start())


def test_a_port_that_was_shared_is_refused() -> None:
    """The original listens with SO_REUSEPORT: beside it, ours would take half of its calls."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="another"):
            asyncio.run(door(f"127.0.0.1:{other.getsockname()[1]}").start())


def test_the_port_is_free_again_after_a_stop() -> None:
    with RunningMaster() as first:
        address = first.target
    with RunningMaster(address=address) as second:
        assert second.target == address
        second.stub()("RegisterClient", node_id="n1")
        assert [node.node_id for node in second.service.list_nodes()] == ["n1"]


def reports_wait(master: RunningMaster, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, asyncio.Event]:
    """Reports do not end before the second event is set; the first one says that one has begun."""
    entered, go_on = threading.Event(), asyncio.Event()

    async def slow(*_arguments: object) -> bool:
        entered.set()
        await go_on.wait()
        return True

    monkeypatch.setattr(master.service, "report", slow)
    return entered, go_on


def test_a_stop_waits_for_calls_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with RunningMaster() as master:
        entered, go_on = reports_wait(master, monkeypatch)
        call = master.stub()
        answers: list[object] = []
        thread = threading.Thread(
            target=lambda: answers.append(call("ReportExternalKvBlocks", node_id="n", hashes=["h"]))
        )
        thread.start()
        assert entered.wait(DEADLINE)

        async def stop() -> None:
            stopping = asyncio.ensure_future(master.door.stop(DEADLINE))
            go_on.set()
            await stopping

        master.run(stop())
        thread.join(DEADLINE)
        assert len(answers) == 1
        with grpc.insecure_channel(master.target, SIZES) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/umbp.UMBPMaster/Heartbeat")(b"", timeout=DEADLINE)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        master.run(master.door.stop(0))


def test_calls_at_once_are_bounded_and_those_refused_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "MAX_CALLS", 1)
    with RunningMaster() as master:
        entered, go_on = reports_wait(master, monkeypatch)
        transport = master.transport()
        thread = threading.Thread(target=taken, args=(lambda: transport.report("n", [b"h"], 1, DEADLINE),))
        thread.start()
        assert entered.wait(DEADLINE)
        with pytest.raises(MasterUnavailable, match="limit"):
            transport.lookup([b"k"], DEADLINE)
        master.tell(go_on.set)
        thread.join(DEADLINE)
        assert taken(lambda: transport.lookup([b"k"], DEADLINE)) == [False]


def taken(call: Callable[[], T]) -> T:
    """The answer to ``call``; gRPC counts a call before it down some time after its answer was here."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            return call()
        except MasterUnavailable:
            assert time.monotonic() < end, "no call is taken any more"
