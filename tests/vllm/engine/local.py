"""A real vLLM engine inside the test's process, with or without the pool, and what tests look at in it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown, get_kv_transfer_group
from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.slab import SlabFile
from umbp_core.ids import block_key
from umbp_core.ports import DeviceCopier
from umbp_core.tiers import Tier
from umbp_vllm.connector import UmbpConnector
from umbp_vllm.leader import Leader
from umbp_vllm.worker import Worker

BLOCK = 32
"""Tokens per block of the tests' engines; the smallest that vLLM's CPU attention has."""

ENGINE_ARGUMENTS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": BLOCK,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 128,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}

REFERENCE_MLA: dict[str, Any] = {"block_size": 16, "attention_backend": "CPU_MLA"}
"""vLLM's reference for latent attention, for every dtype; with AMX it would choose one for bfloat16 alone."""

DEFAULTS: dict[str, Any] = {"dram_capacity": "64MiB", "ssd_capacity": "256MiB", "dram_prefault": False}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt in token ids, and what is not default about its sampling."""

    prompt: Sequence[int]
    max_tokens: int = 12
    n: int = 1
    cache_salt: str | None = None
    adapter: str | None = None
    """Folder of a LoRA adapter."""
    sampling: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> SamplingParams:
        """Greedy unless told otherwise, always the full length, ids only."""
        settings = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, **self.sampling}
        return SamplingParams(max_tokens=self.max_tokens, n=self.n, **settings)

    def input(self) -> dict[str, Any]:
        """In the form of ``LLM.generate``."""
        salt = {} if self.cache_salt is None else {"cache_salt": self.cache_salt}
        return {"prompt_token_ids": list(self.prompt), **salt}

    def lora(self) -> LoRARequest | None:
        """The adapter in vLLM's form."""
        return None if self.adapter is None else LoRARequest(Path(self.adapter).name, 1, self.adapter)


@dataclass(frozen=True, slots=True)
class Reply:
    """The tokens of every parallel sample, and how many prompt tokens were not computed."""

    samples: tuple[tuple[int, ...], ...]
    cached: int
    finish_reason: str | None = "length"

    @property
    def tokens(self) -> tuple[int, ...]:
        """The only sample's tokens."""
        (only,) = self.samples
        return only


def pool(ssd_dir: Path | None = None, **extra: Any) -> dict[str, Any]:
    """A ``kv_transfer_config`` for ``umbp`` with small tiers; ``extra`` are keys of our configuration."""
    settings = {**DEFAULTS, **extra}
    if ssd_dir is not None:
        settings["ssd_dir"] = str(ssd_dir)
    return {"kv_connector": "umbp", "kv_role": "kv_both", "kv_connector_extra_config": settings}


class Engine:
    """An engine in this process.  One at a time: vLLM's distributed state is the process's.

    vLLM goes through the garbage of the whole process several times when an engine starts and ends, which takes much
    longer than the rest.  What was there before the engine is left out of that.
    """

    _open: ClassVar[list[Path]] = []

    def __init__(self, model: Path, **arguments: Any) -> None:
        assert not self._open, f"an engine for {self._open} is open; close it first"
        self.model = model
        self._open.append(model)
        gc.collect()
        gc.freeze()
        try:
            with mock.patch.object(gc, "freeze"):
                self.llm = LLM(str(model), **{**ENGINE_ARGUMENTS, **arguments})
        except BaseException:
            self._cleared()
            raise
        self._numbers = iter(range(1 << 30))

    # ---- requests ------------------------------------------------------------------------------------

    def ask(self, *asks: Ask) -> list[Reply]:
        """Run all of ``asks`` together and return their replies in order."""
        outputs = self.llm.generate(
            [ask.input() for ask in asks],
            [ask.parameters() for ask in asks],
            lora_request=[ask.lora() for ask in asks] if any(ask.adapter for ask in asks) else None,
            use_tqdm=False,
        )
        return [_reply(output) for output in outputs]

    def ask_one(self, ask: Ask) -> Reply:
        """Run one request alone."""
        return self.ask(ask)[0]

    def add(self, ask: Ask) -> str:
        """Add a request without running it; returns its id."""
        request_id = f"test-{next(self._numbers)}"
        self.llm.llm_engine.add_request(request_id, ask.input(), ask.parameters(), lora_request=ask.lora())
        return request_id

    def step(self) -> dict[str, Reply]:
        """One engine step; the requests that it ended."""
        return {output.request_id: _reply(output) for output in self.llm.llm_engine.step() if output.finished}

    def run(self, timeout: float = 150.0) -> dict[str, Reply]:
        """Step until no request is left."""
        replies: dict[str, Reply] = {}
        deadline = time.monotonic() + timeout
        while self.llm.llm_engine.has_unfinished_requests():
            replies |= self.step()
            assert time.monotonic() < deadline, "requests are still unfinished"
        return replies

    def abort(self, request_id: str) -> None:
        """Abort a request."""
        self.llm.llm_engine.abort_request([request_id])

    def blocks_of(self, request_id: str) -> list[int]:
        """The KV blocks of a request of a model with one KV group; empty until it runs (its load has ended)."""
        for request in self.core.scheduler.running:
            if request.request_id.startswith(f"{request_id}-"):
                return list(self.core.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0])
        return []

    # ---- the pool ------------------------------------------------------------------------------------

    def drain(self, timeout: float = 120.0) -> None:
        """Step until the connector has nothing in flight, as an idle engine would."""
        deadline = time.monotonic() + timeout
        while self.connector.has_pending_push_work():
            self.llm.llm_engine.step()
            assert time.monotonic() < deadline, "the connector still has work in flight"

    def forget(self) -> None:
        """Wait for the stores, then empty vLLM's own prefix cache, so that the next hit is the pool's."""
        self.drain()
        assert self.llm.reset_prefix_cache(), "blocks are still referenced although nothing runs"

    def metric(self, name: str, **labels: str) -> float:
        """The sum of vLLM's metrics of this name that carry ``labels``, since the engine started."""
        return sum(
            metric.value
            for metric in self.llm.get_metrics()
            if metric.name == name and labels.items() <= metric.labels.items()
        )

    def external_tokens(self) -> float:
        """Prompt tokens that vLLM says it took from the connector."""
        return self.metric("vllm:external_prefix_cache_hits")

    def pages_of(self, ask: Ask, tier: Tier = Tier.DRAM, group: int = 0) -> list[int]:
        """The pages (or slots) of ``tier`` that hold the full blocks of a prompt in KV ``group``.

        Stops at the first block that ``tier`` does not hold.  All groups must have blocks of one size.
        """
        directory = self.leader.pool.directory
        pages: list[int] = []
        for block_hash in self.block_hashes(ask):
            copy = directory.copy(block_key(block_hash, group), tier)
            if copy is None:
                break
            pages += copy.pages
        return pages

    def block_hashes(self, ask: Ask) -> list[bytes]:
        """vLLM's own hashes of the full blocks of a prompt."""
        hasher = self.core.request_block_hasher
        request = Request("hashes", list(ask.prompt), ask.parameters(), None, block_hasher=hasher)
        return list(request.block_hashes)

    @property
    def arena(self) -> Arena:
        """The DRAM tier's memory."""
        return self.worker.engine._tools.pages

    @property
    def slab(self) -> SlabFile:
        """The SSD tier's file."""
        return self.worker.engine._tools.slots

    def slot_bytes(self, slot: int) -> bytes:
        """The bytes of one SSD slot."""
        buffer = bytearray(self.slab.slot_bytes)
        self.slab.read_into(slot, memoryview(buffer))
        return bytes(buffer)

    @property
    def copier(self) -> DeviceCopier:
        """What moves bytes between KV blocks and arena pages."""
        return self.worker.engine._copier

    def kv_caches(self) -> dict[str, torch.Tensor]:
        """Every layer's KV tensor, ``[block, head, token, content]``."""
        layers = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        return {name: layer.kv_cache for name, layer in layers.items() if hasattr(layer, "kv_cache")}

    @property
    def core(self) -> Any:
        """vLLM's ``EngineCore``."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def connector(self) -> UmbpConnector:
        """The scheduler role's connector."""
        return self.core.scheduler.connector

    @property
    def leader(self) -> Leader:
        """The scheduler half."""
        return self.connector.leader

    @property
    def worker(self) -> Worker:
        """The only rank's worker half."""
        return get_kv_transfer_group()._worker

    def close(self) -> None:
        """Shut down cleanly; the process can have another engine afterwards."""
        with mock.patch.object(gc, "unfreeze"):
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        self._cleared()

    def _cleared(self) -> None:
        gc.collect()
        with mock.patch.object(gc, "unfreeze"):
            cleanup_dist_env_and_memory()
        ensure_kv_transfer_shutdown()
        self._open.clear()


@contextmanager
def engine(model: Path, **arguments: Any) -> Iterator[Engine]:
    """An engine that is closed at the end, after it has taken the results of its last copies.

    A served engine does that by itself, since it goes on stepping; one in this process only steps when asked to.
    """
    opened = Engine(model, **arguments)
    try:
        yield opened
        if opened.core.scheduler.connector is not None:
            opened.drain()
    finally:
        opened.close()


def _reply(output: Any) -> Reply:
    samples = tuple(tuple(sample.token_ids) for sample in sorted(output.outputs, key=lambda sample: sample.index))
    return Reply(samples, output.num_cached_tokens or 0, output.outputs[0].finish_reason)
