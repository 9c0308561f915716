"""The daemon's Prometheus metrics, and the small HTTP door to them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from umbp_connectors.daemon.doors import family_of
from umbp_connectors.daemon.keeper import PoolKeeper
from umbp_connectors.daemon.messages import Overview, PoolView, TierFill
from umbp_connectors.daemon.overview import TRIMMED, overview_of
from umbp_connectors.daemon.server import DaemonServer
from umbp_connectors.master.settings import Endpoint, parse_endpoint
from umbp_core.errors import ConfigError
from umbp_core.tiers import Tier

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_S = 5.0
_POOL = ("pool", "namespace")

Samples = list[tuple[tuple[str, ...], float]]


class Family(NamedTuple):
    """One metric: its name, whether it only grows, its labels and what it means."""

    name: str
    is_counter: bool
    labels: tuple[str, ...]
    meaning: str


CONNECTIONS = Family("umbp_daemon_connections", False, (), "Connections of clients; each client has a few.")
CAPACITY = Family("umbp_daemon_dram_capacity_bytes", False, (), "DRAM of all pools together.")
CLIENTS = Family("umbp_daemon_clients", False, _POOL, "Clients of a pool.")
TIER_CAPACITY = Family("umbp_daemon_tier_capacity_bytes", False, (*_POOL, "tier"), "What a pool has of a tier.")
TIER_USED = Family("umbp_daemon_tier_used_bytes", False, (*_POOL, "tier"), "What of it is taken.")
OBJECTS = Family("umbp_daemon_objects", False, (*_POOL, "tier"), "Objects that can be read.")
OBJECT_BYTES = Family(
    "umbp_daemon_object_bytes", False, (*_POOL, "tier"), "What these objects have; pages are taken as a whole."
)
HELD = Family("umbp_daemon_held_objects", False, (*_POOL, "tier"), "Objects that are being read or written.")
PUTS = Family("umbp_daemon_puts", True, (*_POOL, "status"), "Objects to store, by what became of it.")
GETS = Family("umbp_daemon_gets", True, (*_POOL, "status"), "Objects to read, by what became of it.")
SSD = Family("umbp_daemon_ssd", True, (*_POOL, "event"), "What happened on the way to and from SSD.")
TRIMS = Family("umbp_daemon_trimmed", True, (*_POOL, "tier"), "Objects evicted because a tier was above its watermark.")
_TIERS = (TIER_CAPACITY, TIER_USED, OBJECTS, OBJECT_BYTES, HELD)
FAMILIES = (CONNECTIONS, CAPACITY, CLIENTS, *_TIERS, PUTS, GETS, SSD, TRIMS)


class MetricsDoor:
    """Serves ``/metrics`` at ``HOST:PORT`` (port 0: any), for whoever reaches it; read only."""

    def __init__(self, endpoint: str, keeper: PoolKeeper, server: DaemonServer) -> None:
        self._endpoint = parse_endpoint(endpoint)
        self._pages = lambda: render(overview_of(keeper), server.connections)
        self._http: ThreadingHTTPServer | None = None

    @property
    def address(self) -> str:
        """Where it is; empty unless open."""
        return str(Endpoint(self._endpoint.host, self._http.server_port)) if self._http is not None else ""

    def open(self) -> None:
        """Listen.  Raises ``ConfigError`` when that cannot be."""
        kind = _SERVERS[family_of(self._endpoint)]
        try:
            self._http = kind((self._endpoint.host, self._endpoint.port), _handler(self._pages))
        except OSError as error:
            raise ConfigError(
                f"metrics cannot be served at {self._endpoint}: {error}; give another daemon_metrics_listen, or none"
            ) from error
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, name="umbp-metrics", daemon=True).start()

    def close(self) -> None:
        """Listen no more; idempotent."""
        http, self._http = self._http, None
        if http is not None:
            http.shutdown()
            http.server_close()


class _Ipv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


_SERVERS = {socket.AF_INET: ThreadingHTTPServer, socket.AF_INET6: _Ipv6Server}


def render(overview: Overview, connections: int) -> bytes:
    """The page that says what ``overview`` says, the process's own figures at its end."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Frozen(overview, connections))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Frozen(Collector):
    def __init__(self, overview: Overview, connections: int) -> None:
        self._overview = overview
        self._connections = connections

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry has no other collector of these names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        samples: dict[Family, Samples] = {family: [] for family in FAMILIES}
        samples[CONNECTIONS].append(((), self._connections))
        samples[CAPACITY].append(((), self._overview.dram_bytes))
        for pool in self._overview.pools:
            _add_pool(samples, pool)
        for family, found in samples.items():
            kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
            metric = kind(family.name, family.meaning, labels=family.labels)
            for labels, value in found:
                metric.add_metric(labels, value)
            yield metric


def _add_pool(samples: Mapping[Family, Samples], pool: PoolView) -> None:
    name = (pool.identity[:12], pool.namespace)
    samples[CLIENTS].append((name, len(pool.clients)))
    for fill in pool.fills:
        _add_tier(samples, name, fill, pool.page_bytes)
    for counter, count in pool.counters.items():
        kind, _, status = counter.partition("_")
        if kind in ("put", "get"):
            samples[PUTS if kind == "put" else GETS].append(((*name, status), count))
        elif kind == TRIMMED:
            samples[TRIMS].append(((*name, status), count))
        else:
            samples[SSD].append(((*name, counter), count))


def _add_tier(samples: Mapping[Family, Samples], name: tuple[str, str], fill: TierFill, page_bytes: int) -> None:
    labels = (*name, Tier(fill.tier).name.lower())
    samples[TIER_CAPACITY].append((labels, fill.total_pages * page_bytes))
    samples[TIER_USED].append((labels, (fill.total_pages - fill.free_pages) * page_bytes))
    samples[OBJECTS].append((labels, fill.objects))
    samples[OBJECT_BYTES].append((labels, fill.nbytes))
    samples[HELD].append((labels, fill.pinned + fill.reserved))


def _handler(page: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    """Answers one request of a connection."""

    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_S

        def do_GET(self) -> None:
            """Answer."""
            found = self.path.partition("?")[0] == "/metrics"
            body = page() if found else b"metrics are at /metrics\n"
            self.send_response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Not a line for every scrape."""

    return Handler
