"""The simulated engine: ``EngineCore``'s loop around vLLM's scheduler, with simulated ranks for its workers."""

from __future__ import annotations

import dataclasses
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.vllm.harness.errors import ConnectorFault, KVMismatch, LeakDetected, StuckTransfer
from tests.vllm.harness.ledger import Ledger
from tests.vllm.harness.model import Prefix, expected_output, seed_of, start_state
from tests.vllm.harness.rank import SimulatedRank
from tests.vllm.harness.runner import Chunk, Forward, ModelRunner
from tests.vllm.harness.spec import EngineSpec, make_geometry, make_vllm_config, rank_config

MAX_IDLE_STEPS = 1_000_000
MAX_SECONDS = 120.0


@dataclass
class _Batch:
    """A scheduled step; ``results`` is filled when it has been executed."""

    output: SchedulerOutput
    new_blocks: list[int]
    results: tuple[list[KVConnectorOutput], list[Chunk], list[list[int]], Forward] | None = None


@dataclass
class Asked:
    """What a request was made of, to know what must come out."""

    prompt: list[int]
    max_tokens: int
    salt: str | None = None
    lora: str | None = None


class Harness:
    """One engine.  Not thread safe, like the engine's own loop.

    Every step checks the KV that the forward pass reads on every rank, and every report of a worker.
    ``close`` checks that nothing is left behind.
    """

    def __init__(self, spec: EngineSpec, idle_seconds: float = 0.001, shake_hands: bool = True) -> None:
        self.spec = spec
        self.config = make_vllm_config(spec)
        self.geometry = make_geometry(spec, self.config)
        worker_configs = [rank_config(self.config, rank) for rank in range(spec.world_size)]
        self.ranks = [
            SimulatedRank(config, self.geometry.ranks[rank], rank, spec.v2_runner, spec.deferred_save)
            for rank, config in enumerate(worker_configs)
        ]
        self.scheduler = self._make_scheduler()
        assert self.scheduler.connector is not None
        self.leader = self.scheduler.connector
        self.ledger = Ledger(self.scheduler, len(self.geometry.scheduler.kv_cache_groups))
        if shake_hands:
            self._shake_hands()
        self._aggregator = KVOutputAggregator.from_connector(self.leader, spec.world_size)
        self._runner = ModelRunner(spec.v2_runner, spec.draft_tokens)
        self._hasher = self._make_hasher()
        self._new_blocks: list[int] = []
        self._watch_allocations()
        self._queue: deque[_Batch] = deque()
        self._late_aborts: list[str] = []
        self._idle_seconds = idle_seconds
        self._never = threading.Event()
        self._names = 0
        self.asked: dict[str, Asked] = {}
        self.tokens: dict[str, list[int]] = {}
        """Output tokens per request, as the engine delivered them."""
        self.finish_reasons: dict[str, str] = {}
        self.steps = 0
        self.healthy = True
        """False after a step that raised."""

    def _make_scheduler(self) -> Scheduler:
        kind = AsyncScheduler if self.spec.async_scheduling else Scheduler
        scheduler = kind(
            vllm_config=self.config,
            kv_cache_config=self.geometry.scheduler,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=self.geometry.scheduler_block_size,
            hash_block_size=self.geometry.hash_block_size,
            log_stats=self.spec.log_stats,
        )
        # The runner's convention is chosen by the configuration, which on a CPU allows only V1.
        scheduler.use_v2_model_runner = self.spec.v2_runner
        scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=1 << 20)
        scheduler.max_num_encoder_input_tokens = 1 << 20
        return scheduler

    def _shake_hands(self) -> None:
        metadata = {rank.coordinates: rank.handshake for rank in self.ranks if rank.handshake is not None}
        if metadata:
            self.leader.set_xfer_handshake_metadata_pp_aware(metadata)

    def _make_hasher(self) -> Any:
        hash_function = get_hash_fn_by_name(self.spec.hash_algo)
        init_none_hash(hash_function)
        return get_request_block_hasher(self.geometry.hash_block_size, hash_function)

    def _watch_allocations(self) -> None:
        pool = self.scheduler.kv_cache_manager.block_pool
        original = pool.get_new_blocks

        def get_new_blocks(count: int) -> list[Any]:
            blocks = original(count)
            self._new_blocks.extend(block.block_id for block in blocks)
            return blocks

        pool.get_new_blocks = get_new_blocks  # type: ignore[method-assign]

    # Requests ------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 2,
        *,
        request_id: str | None = None,
        salt: str | None = None,
        lora: str | None = None,
        media: dict[int, tuple[str, int]] | None = None,
        skip_reading: bool = False,
        priority: int = 0,
        parameters: dict[str, Any] | None = None,
    ) -> str:
        """Add a request; its id.  ``media`` maps an offset to (identifier, length), ``parameters`` are for the pool."""
        self._names += 1
        name = request_id or f"r{self._names}"
        request = Request(
            name,
            list(prompt),
            SamplingParams(
                max_tokens=max_tokens,
                temperature=0.0,
                ignore_eos=True,
                skip_reading_prefix_cache=skip_reading,
                extra_args={"kv_transfer_params": parameters} if parameters is not None else None,
            ),
            None,
            cache_salt=salt,
            lora_request=self._lora(lora),
            mm_features=[
                MultiModalFeatureSpec(
                    data=None,
                    modality="image",
                    identifier=identifier,
                    mm_position=PlaceholderRange(offset=offset, length=length),
                )
                for offset, (identifier, length) in sorted((media or {}).items())
            ],
            block_hasher=self._hasher,
            priority=priority,
        )
        words = {
            offset + index: seed_of(identifier)
            for offset, (identifier, length) in (media or {}).items()
            for index in range(length)
        }
        self._runner.starts[name] = Prefix(start_state(salt, lora), words)
        self.asked[name] = Asked(list(prompt), max_tokens, salt, lora)
        self.tokens[name] = []
        self.ledger.added(name)
        self.scheduler.add_request(request)
        return name

    @staticmethod
    def _lora(name: str | None) -> LoRARequest | None:
        return LoRARequest(name, 1 + seed_of(name) % 1000, f"lora/{name}") if name else None

    def abort(self, *request_ids: str) -> None:
        """The client went away, noticed between two steps."""
        for request_id in request_ids:
            self.ledger.aborting(request_id)
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def abort_during_step(self, *request_ids: str) -> None:
        """The client goes away while the next step's batch is being executed."""
        self._late_aborts.extend(request_ids)

    def reset_prefix_cache(self, *, running: bool = False, connector: bool = False) -> bool:
        """As ``LLM.reset_prefix_cache`` does it."""
        return self.scheduler.reset_prefix_cache(running, connector)

    @property
    def is_computing(self) -> bool:
        """Whether tokens are under way whose results the scheduler has not seen."""
        return any(batch.output.total_num_scheduled_tokens for batch in self._queue)

    def external_tokens(self, request_id: str) -> int:
        """Tokens that the connector loaded, or tried to load, for this request."""
        return self.ledger.external_tokens(request_id)

    # Stepping ------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn of the engine's loop; whether any token was computed.

        After an exception the engine is of no use any more: a batch may be scheduled and not processed.
        """
        self.healthy = False
        executed = self._step()
        self.healthy = True
        return executed

    def _step(self) -> bool:
        self.steps += 1
        executed = False
        depth = self.config.max_concurrent_batches
        if self.scheduler.has_requests():
            batch = self._schedule()
            executed = batch.output.total_num_scheduled_tokens > 0
            if not self.spec.lazy_execution:
                self._execute(batch)
            self._queue.append(batch)
            if len(self._queue) < depth and (executed or self.scheduler.has_requests()):
                return executed
        if self._queue:
            self._process(self._queue.popleft())
        return executed

    def _schedule(self) -> _Batch:
        self._new_blocks = []
        output = self.scheduler.schedule()
        if output.kv_cache_block_copies or output.new_block_ids_to_zero:
            raise AssertionError("the harness simulates no model that needs block copies or zeroing")
        return _Batch(output, self._new_blocks)

    def _execute(self, batch: _Batch) -> None:
        output = batch.output
        chunks = self._runner.begin(output)
        forward = Forward(chunks, self.geometry.scheduler)
        results = []
        for rank in self.ranks:
            metadata = pickle.loads(pickle.dumps(output.kv_connector_metadata))
            own = dataclasses.replace(output, kv_connector_metadata=metadata)
            results.append(rank.execute(own, lambda r: r.poison(batch.new_blocks), lambda r=rank: forward.run(r)))
        batch.results = (results, chunks, self._runner.sample(chunks), forward)

    def _process(self, batch: _Batch) -> None:
        if batch.results is None:
            self._execute(batch)
        assert batch.results is not None
        reports, chunks, sampled, forward = batch.results
        self._check_reads(forward, reports)
        if self._late_aborts:
            names, self._late_aborts = self._late_aborts, []
            self.abort(*names)
        self.ledger.observe(reports)
        outputs: list[ModelRunnerOutput | None] = [
            ModelRunnerOutput(
                req_ids=[chunk.request_id for chunk in chunks],
                req_id_to_index={chunk.request_id: index for index, chunk in enumerate(chunks)},
                sampled_token_ids=[list(tokens) for tokens in sampled],
                kv_connector_output=report,
            )
            for report in reports
        ]
        merged = self._aggregator.aggregate(outputs, self.spec.world_size - self.spec.tp)
        assert merged is not None
        self._deliver(self.scheduler.update_from_output(batch.output, merged))
        if self.spec.draft_tokens and chunks:
            live = [chunk for chunk in chunks if chunk.request_id in self._runner.requests]
            self.scheduler.update_draft_token_ids(self._runner.draft(live))

    def _check_reads(self, forward: Forward, reports: list[KVConnectorOutput]) -> None:
        """Raise for wrong KV, unless the connector says in the same step that it failed to load it."""
        invalid = set[int]().union(*(report.invalid_block_ids for report in reports))
        tables = {chunk.request_id: chunk.blocks for chunk in forward.chunks}
        wrong = []
        for mismatch in forward.mismatches:
            table = tables[mismatch.request_id][mismatch.group]
            if not invalid.intersection(table[: table.index(mismatch.block) + 1]):
                wrong.append(mismatch)
        if wrong:
            listed = "\n  ".join(str(mismatch) for mismatch in wrong[:6])
            raise KVMismatch(f"step {self.steps}: {len(wrong)} wrong KV reads:\n  {listed}")

    def _deliver(self, outputs: dict[int, Any]) -> None:
        for client in outputs.values():
            for output in client.outputs:
                self.tokens[output.request_id].extend(output.new_token_ids)
                if output.finish_reason is not None:
                    self.finish_reasons[output.request_id] = str(output.finish_reason)
                    self._check_output(output.request_id)

    def _check_output(self, request_id: str) -> None:
        asked = self.asked[request_id]
        got = self.tokens[request_id]
        if self._runner.starts[request_id].media:
            return
        wanted = expected_output(asked.prompt, len(got), asked.salt, asked.lora)
        if got != wanted:
            raise ConnectorFault(f"{request_id}: tokens {got}, a run without any cache gives {wanted}")

    def yield_to_transfers(self) -> None:
        """What ``EngineCore`` does after a step without computation: leave the interpreter to other threads."""
        self._never.wait(self._idle_seconds)

    def run_until_finished(self, *request_ids: str) -> None:
        """Step until these requests (all, when none is named) have finished; bounded (law L4)."""

        def done() -> bool:
            if request_ids:
                return all(self._is_finished(name) for name in request_ids)
            return not self.scheduler.has_unfinished_requests() and not self._queue

        self._step_until(done, "requests did not finish")

    def _is_finished(self, request_id: str) -> bool:
        request = self.scheduler.requests.get(request_id)
        return request is None or request.is_finished()

    def step_until(self, condition: Callable[[], bool]) -> None:
        """Step, leaving the transfers time, until ``condition`` holds; bounded."""
        self._step_until(condition, "the condition never came true")

    def drain(self) -> None:
        """Step until the engine would go to sleep; bounded (law L4)."""
        self._step_until(lambda: not self.scheduler.has_requests() and not self._queue, "the engine never got idle")

    def _step_until(self, done: Callable[[], bool], complaint: str) -> None:
        deadline = time.monotonic() + MAX_SECONDS
        idle = 0
        while not done():
            if self.step():
                idle = 0
                continue
            idle += 1
            if idle > MAX_IDLE_STEPS or time.monotonic() > deadline:
                raise StuckTransfer(f"{complaint} within {idle} idle steps: {self._describe()}")
            self.yield_to_transfers()

    def _describe(self) -> str:
        requests = {
            name: f"{request.status.name} {request.num_computed_tokens}/{request.num_tokens}"
            for name, request in self.scheduler.requests.items()
        }
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return (
            f"requests {requests}, {free} free blocks, {len(self._queue)} batches in flight, pending push work"
            f" {self.leader.has_pending_push_work()}, pending block frees {self.leader.has_pending_block_frees()}"
        )

    # The end -------------------------------------------------------------------------------------------

    def check_no_leak(self) -> None:
        """Nothing is left on the scheduler; the engine must be idle."""
        scheduler = self.scheduler
        if scheduler.requests or scheduler.running or scheduler.deferred_frees:
            raise LeakDetected(f"requests left on the scheduler: {sorted(scheduler.requests)}")
        pool = scheduler.kv_cache_manager.block_pool
        held = self.geometry.scheduler.num_blocks - 1 - pool.get_num_free_blocks()
        if held:
            raise LeakDetected(f"{held} blocks are still held")

    def close(self, check: bool = True) -> None:
        """Drain, check for leaks, shut down.  ``check=False`` leaves at once, as a crash of the test does."""
        try:
            if check:
                self.drain()
                self.check_no_leak()
        finally:
            for rank in self.ranks:
                rank.close()
            self.scheduler.shutdown()

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(check=kind is None)
