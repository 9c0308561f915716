"""The class that vLLM loads: one facade, two roles, nothing but delegation.

``UmbpConnector`` is created once in the scheduler process (role SCHEDULER) and once per rank (role WORKER).
This is one of the named boundaries of the project: no exception of ours leaves a method that vLLM's
scheduler or forward thread calls.  It is counted, logged once per place, and the call answers as if the
pool held nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from umbp_connectors.debug.window import Window
from umbp_core.errors import ConfigError, StateError
from umbp_vllm import compat
from umbp_vllm.compat import (
    CacheHitSource,
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from umbp_vllm.groups import failures_by_block
from umbp_vllm.leader import Leader
from umbp_vllm.load_outcome import LoadOutcome
from umbp_vllm.metadata import HandshakeHello, StepMetadata, WorkerReport
from umbp_vllm.reporting import Reporting
from umbp_vllm.setup import make_leader, make_reporting, make_worker, needs_layers, settings_of
from umbp_vllm.stats import UmbpPromMetrics, UmbpStats
from umbp_vllm.worker import Worker

logger = logging.getLogger("vllm.umbp.connector")

T = TypeVar("T")
CLOSE_TIMEOUT_S = 5.0
_SOURCES = {} if CacheHitSource is None else {"dram": CacheHitSource.HOST, "ssd": CacheHitSource.DISK}


def _guarded(default: Callable[[], Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A boundary: an exception inside becomes ``default()``, one log entry per method, and a count."""

    def wrap(method: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(method)
        def call(self: UmbpConnector, *args: Any, **kwargs: Any) -> T:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 - engine boundary: nothing of ours may reach it
                self._failed(method.__name__, error)
                return default()  # type: ignore[no-any-return]

        return call

    return wrap


class UmbpConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's KV connector ``umbp``: KV blocks live on in DRAM and SSD and come back by their hash."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._vllm_config = vllm_config
        self._cache_config = kv_cache_config
        self._settings = settings_of(vllm_config)
        self._leader: Leader | None = None
        self._reporting: Reporting | None = None
        self._worker: Worker | None = None
        self._outcome = LoadOutcome()
        self._idle = False
        self._failures: dict[str, int] = {}
        self._window: Window | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._reporting = make_reporting(vllm_config, kv_cache_config, self._settings)
            self._leader = make_leader(vllm_config, kv_cache_config, self._settings, self._reporting)

    def dump_state(self) -> dict[str, object]:
        """What this half is doing: every request, op and pin of the leader, every op of a worker.  Only reads."""
        half = self._worker if self._leader is None else self._leader
        state: dict[str, object] = {"failures": dict(self._failures)}
        return state if half is None else state | half.dump_state()

    @_guarded(lambda: None)
    def _open_window(self, name: str) -> None:
        if self._settings.config.debug_socket and self._window is None:
            self._window = Window(name, self.dump_state)
            self._window.open()

    @_guarded(lambda: None)
    def _show(self) -> None:
        """Between two steps: have the snapshot made that ``umbp debug dump`` waits for."""
        if self._window is not None:
            self._window.serve()

    def _failed(self, place: str, error: Exception) -> None:
        self._failures[place] = self._failures.get(place, 0) + 1
        if self._leader is not None:
            self._leader.stats.add("vllm:umbp_degraded", 1, f"internal_{place}")
        if self._failures[place] == 1:
            logger.error("umbp: %s failed; the engine goes on without this answer (logged once)", place, exc_info=error)

    # ---- properties of the connector -----------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """False: this is a cache; losing a store loses a hit and nothing else."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether graphs must leave the attention out, so that the forward pass can stop at each layer."""
        try:
            return needs_layers(extra_config)
        except ConfigError:  # said, in full, when the connector is made
            return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> UmbpStats:
        """Statistics in the API server's process, from plain data."""
        return UmbpStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> UmbpPromMetrics:
        """Our counters in vLLM's Prometheus registry."""
        return UmbpPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- scheduler role ------------------------------------------------------------------------------

    @functools.cached_property
    def leader(self) -> Leader:
        """The scheduler half; only in the scheduler process."""
        if self._leader is None:
            raise RuntimeError("this umbp connector has the worker role; vLLM asked it a scheduler's question")
        return self._leader

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Take vLLM's block pool, so that blocks under a store can be held."""
        self._hold_in(gpu_block_pool)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Take vLLM's cache manager (0.30 and later): it knows every request's blocks."""
        self.leader.tables.bind(kv_cache_manager)
        self._hold_in(kv_cache_manager.block_pool)

    def _hold_in(self, block_pool: Any) -> None:
        if self.leader.held.bind(block_pool):
            compat.before_reset(block_pool, self._let_go_of_blocks)
            self._open_window("vllm-leader")
            self._report_from(block_pool)

    @_guarded(lambda: None)
    def _report_from(self, block_pool: Any) -> None:
        if self._reporting is not None:
            self._reporting.start(block_pool)

    @_guarded(lambda: None)
    def _let_go_of_blocks(self) -> None:
        self.leader.let_go_of_blocks()

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[Any, Any]) -> None:
        """Take the workers' hellos before the first request."""
        self.leader.greet(value.hello for value in metadata.values() if isinstance(value, HandshakeHello))

    @_guarded(lambda: None)
    def on_new_request(self, request: Any) -> None:
        """A request arrived."""
        self.leader.on_new_request(request)

    @_guarded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that the pool can give beyond ``num_computed_tokens``; loads are asynchronous."""
        return self.leader.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks exist; a promised load starts.  One that cannot start is reported as failed, never forgotten."""
        try:
            self.leader.allocated(request, blocks, num_external_tokens)
        except Exception as error:  # noqa: BLE001 - engine boundary: the same
            self._failed("update_state_after_alloc", error)
            if num_external_tokens:
                self.leader.refuse_load(request, blocks.get_block_ids())

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """The workers' instructions for this step."""
        self.leader.begin_step()
        self._plan_step(scheduler_output)
        self._report_step()
        if self._window is not None and self._window.asked:
            self._show()
        return self.leader.drain()

    @_guarded(lambda: None)
    def _plan_step(self, scheduler_output: Any) -> None:
        self.leader.plan_step(scheduler_output)

    @_guarded(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers report."""
        self.leader.step_ended(compat.optional(connector_output, "invalid_block_ids") or set())
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self.leader.take_report(report)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """For models with one KV group; see :meth:`request_finished_all_groups`."""
        return self.request_finished_all_groups(request, (block_ids,))

    @_guarded(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never keeps a request's blocks: blocks under a store are held one by one."""
        self.leader.finished(request)
        return False, None

    @_guarded(dict)
    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """Which tier the external hit came from (0.32 and later)."""
        return {_SOURCES[tier]: count for tier, count in self.leader.hit_tokens(request).items() if tier in _SOURCES}

    def take_events(self) -> Iterable[Any]:
        """KV events of the DRAM and SSD tiers since the last call."""
        self._report_step()
        return self.leader.take_events()

    @_guarded(lambda: None)
    def _report_step(self) -> None:
        if self._reporting is not None:
            self._reporting.step()

    def get_kv_connector_stats(self) -> UmbpStats | None:
        """Counters since the last call; only the scheduler counts, it sees every rank."""
        if self._leader is None:
            return None
        self._count_reports()
        return self._leader.stats.take()

    @_guarded(lambda: None)
    def _count_reports(self) -> None:
        if self._reporting is not None:
            for reading in self._reporting.readings():
                self.leader.stats.reported(reading)

    @_guarded(lambda: False)
    def has_pending_push_work(self) -> bool:
        """True while something of ours is in flight, so that an idle engine still takes its result."""
        return self.leader.has_work

    @_guarded(lambda: False)
    def has_pending_block_frees(self) -> bool:
        """True while transfers hold HBM blocks that will come free without preempting anyone."""
        pool = self.leader.pool
        return pool is not None and pool.frees_blocks

    @_guarded(lambda: False)
    def reset_cache(self) -> bool | None:
        """Empty the pool."""
        return self.leader.reset_cache()

    # ---- worker role ---------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """The KV tensors exist: open this rank's arena and slab and start its transfer engine.

        Raises ``ConfigError`` for a configuration that cannot work on this machine, which stops the start, and
        ``StateError`` when it is called again: ops in flight have the addresses of the tensors that it was given.
        """
        if self._worker is not None:
            raise StateError("this rank's KV caches are registered already; make a new connector for new ones")
        self._worker = make_worker(self._vllm_config, self._cache_config, self._settings, kv_caches)
        self._open_window(f"vllm-rank{self._worker.hello.world_rank}")

    @_guarded(lambda: None)
    def unregister_kv_caches(self) -> None:
        """Sleep mode of vLLM takes the KV tensors' memory away; when it wakes up, they are where they were (0.33)."""
        if self._worker is not None:
            self._worker.let_go_of_hbm()

    def get_handshake_metadata(self) -> Any:
        """This rank's hello."""
        return HandshakeHello(self._worker.hello) if self._worker is not None else None

    @_guarded(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: StepMetadata) -> None:
        """Blocks may be overwritten from here on: end the stores that still read some of them.

        Waits only after a reset of vLLM's prefix cache, for the copies that were under way.
        """
        if self._worker is not None and kv_connector_metadata.fences:
            self._worker.fence(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: StepMetadata) -> None:
        """A step begins; nothing of it is computed yet."""
        super().bind_connector_metadata(connector_metadata)
        self._store_ahead(connector_metadata)

    @_guarded(lambda: None)
    def _store_ahead(self, metadata: StepMetadata) -> None:
        if self._worker is not None:
            self._worker.store_ahead(metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the step's layer-wise loads and note whether it computes anything.

        Its other ops start in :meth:`wait_for_save`, behind its fence.  Model runner V2 calls this outside of any
        forward context, but says what it scheduled when it did.
        """
        self._idle = "scheduler_output" not in kwargs and (forward_context is None or compat.is_idle(forward_context))
        metadata = self._get_connector_metadata()
        if self._worker is not None and metadata.layerwise:
            with self._distrusting(self._worker, "start_load_kv"):
                self._worker.load_ahead(metadata, by_layer=compat.asks_by_layer(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for a layer of the step's layer-wise loads, at most until their deadline."""
        if self._worker is not None and self._worker.gate.is_open:
            with self._distrusting(self._worker, "wait_for_layer_load"):
                self._worker.gate.wait(layer_name)

    @contextlib.contextmanager
    def _distrusting(self, worker: Worker, place: str) -> Iterator[None]:
        """A boundary, as :func:`_guarded`: what the forward pass reads after a failure is not known to be right."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - engine boundary: the same
            worker.gate.distrust()
            self._failed(place, error)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """A layer of the step is launched: what stores by layer may take it.  Does not wait."""
        if self._worker is not None and self._worker.stores_by_layer:
            self._layer_done(self._worker, layer_name)

    @_guarded(lambda: None)
    def _layer_done(self, worker: Worker, layer_name: str) -> None:
        worker.layer_done(layer_name)

    @_guarded(lambda: None)
    def wait_for_save(self) -> None:
        """The step is launched: mark its end on the device and start its ops.  Does not wait."""
        if self._worker is not None:
            self._worker.step(self._get_connector_metadata())
        if self._window is not None and self._window.asked:
            self._show()

    @_guarded(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Loads that ended, and which of them failed.  Nothing is ever reported as sent."""
        if self._worker is None:
            return KVConnectorTransferResults()
        self._outcome = self._worker.poll(idle=self._idle, finished=finished_req_ids)
        failed = self._outcome.failed if self._reports_requests else set()
        return KVConnectorTransferResults(
            finished_sending=set(), finished_recving=self._outcome.ended, failed_recving=failed
        )

    @_guarded(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The form of vLLM up to 0.29."""
        results = self.get_transfer_results(finished_req_ids)
        return None, results.finished_recving or None

    @functools.cached_property
    def _reports_requests(self) -> bool:
        """Failed loads are named by request where their blocks would not say enough."""
        return not failures_by_block(self._cache_config)

    @_guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """HBM blocks of failed loads, for models with one KV group that sees everything before it."""
        blocks, self._outcome.bad_blocks = self._outcome.bad_blocks, set()
        if self._worker is not None:
            blocks |= self._worker.take_void_blocks()
        return set() if self._reports_requests else blocks

    @_guarded(lambda: None)
    def build_connector_worker_meta(self) -> WorkerReport | None:
        """What the leader must hear of this step."""
        return self._worker.take_report() if self._worker is not None else None

    @_guarded(lambda: None)
    def shutdown(self) -> None:
        """End everything of this role within a bound."""
        if self._window is not None:
            self._window.close()
        if self._leader is not None:
            self._leader.shutdown()
        if self._reporting is not None:
            self._reporting.close()
        if self._worker is not None:
            self._worker.close(CLOSE_TIMEOUT_S)
