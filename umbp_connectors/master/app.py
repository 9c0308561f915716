"""The process of a master: state, both doors, metrics and the store of nodes on one loop, from start to stop."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from umbp_connectors.master.http import HttpServer, Page
from umbp_connectors.master.listening import AddressBusy, check_free
from umbp_connectors.master.metrics import MasterMetrics, StoreStats
from umbp_connectors.master.metrics_text import CONTENT_TYPE, render
from umbp_connectors.master.native_server import NativeLimits, NativeServer
from umbp_connectors.master.ports import ClientStore
from umbp_connectors.master.redis_store import redis_backend
from umbp_connectors.master.security import Security, load
from umbp_connectors.master.service import MasterService
from umbp_connectors.master.settings import Endpoint, MasterConfig
from umbp_connectors.master.sqlite_store import SqliteBackend, default_folder
from umbp_connectors.master.stores import NoStore, WriteBehindStore
from umbp_core.errors import ConfigError
from umbp_core.master.state import MasterState
from umbp_core.wire import bounds

if TYPE_CHECKING:
    from umbp_connectors.master.peers import PeerEvictions

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Doors:
    """Where a master that is ready can be reached; ``None`` where there is no such door."""

    grpc: Endpoint | None
    native: Endpoint | None
    metrics: Endpoint | None
    nodes: int
    """How many nodes it knows from before."""
    socket: Path | None

    def __str__(self) -> str:
        """``key=value`` with blanks between, for people and programs; a path is the last."""
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value is not None)


class Store(ClientStore, Protocol):
    """A store of nodes that says what it does."""

    def stats(self) -> StoreStats | None:
        """Figures for the metrics; ``None`` where nothing is kept."""
        ...


class Door(Protocol):
    """Serves a protocol until it is stopped."""

    async def stop(self, grace: float) -> None:
        """Take no more calls, and end when those under way are answered; after ``grace`` seconds in any case."""
        ...


def make_store(config: MasterConfig, env: Mapping[str, str]) -> Store:
    """The store of nodes that ``config`` asks for, not opened yet.  Raises ``ConfigError``."""
    makers: Mapping[str, Callable[[], Store]] = {
        "embedded": lambda: _embedded(config, env),
        "redis": lambda: WriteBehindStore(redis_backend(config), required=config.redis_required),
        "none": NoStore,
    }
    return makers[config.metadata_backend if config.keeps_state else "none"]()


def _embedded(config: MasterConfig, env: Mapping[str, str]) -> Store:
    """A folder that was named has to be usable; without the default one a master does."""
    if config.state_dir:
        return WriteBehindStore(SqliteBackend(Path(config.state_dir).expanduser().absolute()))
    folder = default_folder(config, env)
    if folder is None:
        logger.info("umbp: nodes are not remembered over a restart; name a folder by --state-dir")
        return NoStore()
    return WriteBehindStore(SqliteBackend(folder), required=False)


class MasterApp:
    """A master as ``config`` describes it.  Makes nothing before :meth:`run`, which is called once."""

    def __init__(self, config: MasterConfig, env: Mapping[str, str]) -> None:
        self._config = config
        self._env = env
        self._metrics = MasterMetrics()
        self._scrape = asyncio.Lock()
        self._doors: list[Door] = []
        self._ready = False

    async def run(self, stop: asyncio.Event, announce: Callable[[Doors], None]) -> None:
        """Serve until ``stop`` is set; ``announce`` is called once, when everything can be reached.

        Raises ``ConfigError`` or ``StoreUnavailable``, with one sentence, when it cannot start.
        """
        config = self._config
        security = load(config)
        native = self._check_addresses()
        store = make_store(config, self._env)
        evictions = _peer_evictions(config)
        # The incarnation tells followers of changes that this is not the master that they knew.
        state = MasterState(config.settings(), random.Random(), incarnation=time.time_ns())
        service = MasterService(state, clock=time.monotonic, store=store, observer=self._metrics, evictions=evictions)
        async with AsyncExitStack() as stack:
            stack.callback(store.close)
            if evictions is not None:
                stack.push_async_callback(evictions.close)
            known = service.restore()
            housekeeping = asyncio.ensure_future(service.run_housekeeping())
            stack.push_async_callback(_cancelled, housekeeping)
            http = HttpServer(
                {
                    "/metrics": lambda: self._page(service, store),
                    "/healthz": _healthz,
                    "/readyz": self._readyz,
                }
            )
            stack.push_async_callback(http.stop)
            stack.push_async_callback(self._close_doors)
            metrics = None if config.metrics_endpoint is None else await http.start(config.metrics_endpoint)
            grpc = await self._open_grpc(service, security)
            tcp = await self._open_native(service, security, native)
            doors = Doors(grpc, tcp, metrics, known, config.native_socket)
            self._warn_if_open(security, doors)
            self._ready = True
            announce(doors)
            await _first_of(housekeeping, stop)

    def _check_addresses(self) -> Endpoint | None:
        """Whether every address is free; returns where the native protocol goes, which may give way."""
        config = self._config
        for endpoint, option in ((config.grpc_endpoint, "--listen"), (config.metrics_endpoint, "--metrics-listen")):
            if endpoint is not None:
                check_free(endpoint, option)
        native = config.native_endpoint
        try:
            if native is not None:
                check_free(native, "--native-listen")
        except AddressBusy:
            if config.native_listen != "auto":
                raise
            logger.warning("umbp: %s is taken, so the native protocol is not served; see --native-listen", native)
            native = None
        return native

    async def _open_grpc(self, service: MasterService, security: Security) -> Endpoint | None:
        endpoint = self._config.grpc_endpoint
        if endpoint is None:
            return None
        try:
            from umbp_connectors.master.grpc_server import GrpcServer
        except ImportError as error:
            logger.warning("umbp: gRPC is not served at %s: %s", endpoint, error)
            return None
        server = GrpcServer(service, self._metrics, str(endpoint), security=security)
        self._doors.append(server)
        await server.start()
        return Endpoint(endpoint.host, server.port)

    async def _open_native(
        self, service: MasterService, security: Security, endpoint: Endpoint | None
    ) -> Endpoint | None:
        path = self._config.native_socket
        if endpoint is None and path is None:
            if not self._doors:
                raise ConfigError("there is no door left to serve; see --native-listen and --native-socket")
            return None
        limits = NativeLimits(max_frame=self._config.max_frame, max_hashes=min(self._config.query_max, bounds.HASHES))
        tls = None if security.tls is None else security.tls.context
        server = NativeServer(service, self._metrics, token=security.token, tls=tls, limits=limits)
        self._doors.append(server)
        if path is not None:
            await server.listen_unix(path)
        if endpoint is None:
            return None
        return Endpoint(endpoint.host, await server.listen_tcp(*endpoint))

    async def _close_doors(self) -> None:
        self._ready = False
        grace = self._config.grpc_shutdown_deadline_sec
        await asyncio.gather(*(door.stop(grace) for door in self._doors))

    def _warn_if_open(self, security: Security, doors: Doors) -> None:
        reached = [str(endpoint) for endpoint in (doors.grpc, doors.native) if endpoint and not endpoint.loopback]
        if reached and security.open:
            logger.warning(
                "umbp: whoever reaches %s may read and change everything; see --token-file, or listen on 127.0.0.1",
                " or ".join(reached),
            )

    async def _page(self, service: MasterService, store: Store) -> Page:
        """One at a time: a page of many nodes takes a while, in a thread."""
        async with self._scrape:
            snapshot = self._metrics.snapshot(service.list_nodes(), store.stats())
            body = await asyncio.get_running_loop().run_in_executor(None, render, snapshot)
        return Page(HTTPStatus.OK, body, CONTENT_TYPE)

    async def _readyz(self) -> Page:
        if self._ready:
            return Page(HTTPStatus.OK, b"ready\n")
        return Page(HTTPStatus.SERVICE_UNAVAILABLE, b"not ready\n")


def _peer_evictions(config: MasterConfig) -> PeerEvictions | None:
    """What asks nodes to evict, over their own gRPC; ``None`` without the packages for it."""
    try:
        from umbp_connectors.master.peers import PeerEvictions
    except ImportError as error:
        logger.warning("umbp: full nodes are not asked to evict: %s", error)
        return None
    return PeerEvictions(deadline=config.evictkey_deadline_ms / 1000)


async def _healthz() -> Page:
    return Page(HTTPStatus.OK, b"alive\n")


async def _cancelled(task: asyncio.Future[T]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _first_of(housekeeping: asyncio.Future[None], stop: asyncio.Event) -> None:
    """Wait for ``stop``; what ``housekeeping`` dies of is raised."""
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((housekeeping, stopped), return_when=asyncio.FIRST_COMPLETED)
        if housekeeping.done():
            housekeeping.result()
    finally:
        await _cancelled(stopped)
