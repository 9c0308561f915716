"""A master's gRPC door in a thread of this process, and UMBP's stubs as another program would have them."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc
from google.protobuf import message_factory

from umbp_connectors.client.grpc_transport import GrpcTransport
from umbp_connectors.master.grpc_server import GrpcServer
from umbp_connectors.master.security import Security
from umbp_connectors.master.service import MasterService
from umbp_connectors.wire_grpc import messages as pb
from umbp_core.master.model import ClientRecord, MasterSettings
from umbp_core.master.state import MasterState

T = TypeVar("T")
OPEN = Security(b"", None)
DEADLINE = 60.0
HBM, DRAM, SSD = 1, 2, 3

_TEXT = pb.pool_of(pb.files())
SIZES = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 80 << 20)]


def message(name: str) -> Any:
    """A message class as the .proto says: hashes and keys are strings."""
    return message_factory.GetMessageClass(_TEXT.FindMessageTypeByName(f"umbp.{name}"))


def methods() -> list[Any]:
    """The descriptors of the calls of ``UMBPMaster``."""
    return list(_TEXT.FindServiceByName("umbp.UMBPMaster").methods)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Recorder:
    """A ``MasterObserver`` that keeps what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.metrics: list[tuple[str, tuple[str, ...], Any]] = []
        self.seconds: list[float] = []
        self.finished = threading.Condition()

    def call_finished(self, protocol: str, call: str, code: str, seconds: float) -> None:
        with self.finished:
            self.calls.append((protocol, call, code))
            self.seconds.append(seconds)
            self.finished.notify_all()

    def metrics_reported(self, node: str, tags: Any, samples: Any) -> None:
        self.metrics.append((node, tuple(tags), list(samples)))

    def _ignore(self, *_args: object) -> None:
        """Everything else is tested with the service."""

    reported = revoked = matched = node_changed = node_gone = heartbeat = routed = _ignore


class Memory:
    """A ``ClientStore``."""

    def __init__(self) -> None:
        self.records: dict[str, ClientRecord] = {}

    def load(self) -> list[ClientRecord]:
        return list(self.records.values())

    def catch_up(self, take: Callable[[list[ClientRecord]], None]) -> None:
        """There is never more."""

    def save(self, record: ClientRecord) -> None:
        self.records[record.node_id] = record

    def delete(self, node_id: str) -> None:
        self.records.pop(node_id, None)

    def close(self) -> None:
        """Nothing to finish."""


class Stub:
    """UMBP's calls, made with messages as the .proto says."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self.channel = channel
        self._metadata = metadata
        self._methods = {method.name: method for method in methods()}

    def __call__(self, call: str, **fields: Any) -> Any:
        """Call, and wait for the answer."""
        method = self._methods[call]
        return self.send(call, message(method.input_type.name)(**fields).SerializeToString())

    def send(self, call: str, data: bytes) -> Any:
        """The same with bytes that may be wrong."""
        answer = message(self._methods[call].output_type.name)
        return answer.FromString(self.raw(call)(data, timeout=DEADLINE, metadata=self._metadata))

    def raw(self, call: str) -> Any:
        """Bytes to bytes."""
        return self.channel.unary_unary(f"/umbp.UMBPMaster/{call}")

    def error(self, call: str, **fields: Any) -> tuple[grpc.StatusCode, str]:
        """The status of a call that has to fail."""
        try:
            answer = self(call, **fields)
        except grpc.RpcError as error:
            return error.code(), error.details()
        raise AssertionError(f"{call} was answered: {answer}")


class RunningMaster:
    """State, service and door on a loop of their own; time passes when ``clock`` is moved."""

    def __init__(
        self,
        settings: MasterSettings | None = None,
        *,
        security: Security = OPEN,
        store: Memory | None = None,
        address: str = "127.0.0.1:0",
    ) -> None:
        self.clock = Clock()
        self.observer = Recorder()
        self.store = store or Memory()
        self.state = MasterState(settings or MasterSettings(), random.Random(7))
        self.service = MasterService(self.state, clock=self.clock, store=self.store, observer=self.observer)
        self.door = GrpcServer(self.service, self.observer, address, security=security)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="master")
        self._channels: list[grpc.Channel] = []
        self._transports: list[GrpcTransport] = []

    def __enter__(self) -> RunningMaster:
        self._thread.start()
        try:
            self.service.restore()
            self.run(self.door.start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for transport in self._transports:
            transport.close()
        for channel in self._channels:
            channel.close()
        self.run(self.door.stop(0))
        self._end()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.door.port}"

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Do ``work`` on the master's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work`` on the master's loop."""
        return self.begin(work).result(DEADLINE)

    def tell(self, function: Callable[[], T]) -> T:
        """``function`` on the master's loop."""

        async def call() -> T:
            return function()

        return self.run(call())

    def stub(self, channel: grpc.Channel | None = None, token: str = "") -> Stub:
        """UMBP's stub, on a connection of its own."""
        channel = channel or grpc.insecure_channel(self.target, SIZES)
        self._channels.append(channel)
        return Stub(channel, (("authorization", f"Bearer {token}"),) if token else ())

    def transport(self, **options: Any) -> GrpcTransport:
        """Our own client."""
        transport = GrpcTransport.connect(self.target, DEADLINE, **options)
        self._transports.append(transport)
        return transport

    def pass_time(self, seconds: float) -> None:
        """Move the clock, and let the master see what that means."""
        self.clock.now += seconds
        self.tell(lambda: self.state.tick(self.clock.now))

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()


def matches(answer: Any) -> dict[str, dict[int, list[str]]]:
    """A ``MatchExternalKvResponse`` as node to tier to hashes."""
    return {match.node_id: {part.tier: list(part.hashes) for part in match.hashes_by_tier} for match in answer.matches}
