"""The master's gRPC door: UMBP's wire, with health, reflection, and optionally a token and TLS.

Handlers get and return bytes: the messages are read and written by ``grpc_calls`` and ``grpc_raw``.  Needs the extra
``grpc``.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

from umbp_connectors.master.grpc_calls import Call, MasterCalls
from umbp_connectors.master.listening import check_free
from umbp_connectors.master.ports import MasterObserver
from umbp_connectors.master.security import Security
from umbp_connectors.master.service import MasterService
from umbp_connectors.master.settings import parse_endpoint
from umbp_connectors.wire_grpc import channel as wire
from umbp_connectors.wire_grpc import grpc
from umbp_connectors.wire_grpc import messages as pb
from umbp_core.errors import ConfigError, MasterError

try:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection, reflection_pb2
except ImportError as missing:
    raise ImportError(
        f"the master's gRPC door needs packages that are not installed ({missing}): "
        "pip install 'umbp-connectors[grpc]', or switch the door off"
    ) from missing

MAX_CALLS = 4096
"""Calls under way at once; more are answered ``RESOURCE_EXHAUSTED``."""
_OPTIONS: tuple[wire.Option, ...] = (
    *wire.MESSAGE_OPTIONS,
    # Two masters on one port would share the calls out between them and each know half.
    ("grpc.so_reuseport", 0),
)
_OPEN = Security(b"", None)


class GrpcServer:
    """Serves ``service`` at ``address`` (``host:port``; port 0 takes any free one).

    Lives on the service's loop: :meth:`start`, then :meth:`stop`, once each.
    """

    def __init__(
        self,
        service: MasterService,
        observer: MasterObserver,
        address: str,
        *,
        security: Security = _OPEN,
    ) -> None:
        self._observer = observer
        self._address = address
        self._security = security
        self._calls = MasterCalls(service).table()
        self._server: Any = None
        self._health: Any = None
        self.port = 0
        """Where it listens, once it is started."""

    async def start(self) -> None:
        """Listen and serve.  Raises ``ConfigError`` when it cannot: the port is in use, or not ours to take."""
        # gRPC is content with one of the addresses of a name, and would share the port with whoever has the other.
        check_free(parse_endpoint(self._address), "--listen")
        interceptors = []
        if self._security.token:
            interceptors.append(_TokenGuard(self._security.token, self._observer, self._calls.keys()))
        server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(self._handler(name, call)) for name, call in self._calls.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(pb.MASTER_SERVICE, handlers),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = (pb.MASTER_SERVICE, wire.HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, server, pool=_reflected())
        self.port = self._bind(server)
        await server.start()
        self._server = server
        for name in ("", pb.MASTER_SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float) -> None:
        """Take no more calls, and give those under way ``grace`` seconds.  Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await self._health.enter_graceful_shutdown()
            await server.stop(grace)

    def _bind(self, server: Any) -> int:
        tls = self._security.tls
        try:
            if tls is None:
                port: int = server.add_insecure_port(self._address)
            else:
                credentials = wire.server_credentials(tls.certificate, tls.key, tls.client_ca)
                port = server.add_secure_port(self._address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen for gRPC on {self._address}: {error}") from None
        return port

    def _handler(self, name: str, call: Call) -> Callable[[bytes, Any], Awaitable[bytes]]:
        """What gRPC calls: tells errors by status and details, and how long it took."""
        finished = self._observer.call_finished

        async def serve(request: bytes, context: Any) -> bytes:
            started = perf_counter()
            code = grpc.StatusCode.UNKNOWN
            try:
                answer = await call(request)
                code = grpc.StatusCode.OK
            except MasterError as error:
                code = wire.code_of(error)
                await context.abort(code, str(error))
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            finally:
                finished("grpc", name, code.name, perf_counter() - started)
            return answer

        return serve


class _TokenGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets only those call who show the token; whoever wants to know whether the server is healthy needs none."""

    def __init__(self, token: bytes, observer: MasterObserver, names: Any) -> None:
        self._expected = b"Bearer " + token
        self._observer = observer
        self._names = frozenset(names)
        self._denied = grpc.unary_unary_rpc_method_handler(_deny)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Called by gRPC for every call."""
        service, _, name = details.method.lstrip("/").partition("/")
        if service == wire.HEALTH or self._shown(details.invocation_metadata):
            return await continuation(details)
        if service == pb.MASTER_SERVICE and name in self._names:
            self._observer.call_finished("grpc", name, grpc.StatusCode.UNAUTHENTICATED.name, 0.0)
        return self._denied

    def _shown(self, metadata: Any) -> bool:
        given = [value for key, value in metadata if key == wire.AUTHORIZATION]
        return len(given) == 1 and hmac.compare_digest(_as_bytes(given[0]), self._expected)


async def _deny(_request: bytes, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "this master wants a token: send the metadata 'authorization: Bearer TOKEN'"
    )


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _reflected() -> Any:
    """A pool for reflection: UMBP's files, and those of the services that every server has."""
    others = [pb.description_of(module.DESCRIPTOR) for module in (health_pb2, reflection_pb2)]
    return pb.pool_of([*pb.files(), *others])
