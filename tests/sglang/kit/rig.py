"""SGLang's own test kit, driven with any backend: a real tree, controller and host pools, on plain memory.

An :class:`Engine` is what one server has: device pools, a tree, host pools and a storage backend.  It does by
hand what the scheduler does: insert, write back, look up, prefetch, load back.  The data that it computes is
the function of the tokens in :mod:`content`, so every check is of bytes.
"""

from __future__ import annotations

import contextlib
import json
import unittest
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang.kernels.ops.attention.fla.chunk_delta_h import CHUNK_SIZE
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.events import KvEventLoraNames
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.kits.unified_radix_cache import fixtures, mixins
from sglang.test.kits.unified_radix_cache.config import CacheConfig
from sglang.test.kits.unified_radix_cache.storage import UnifiedRadixCacheStorageFixtures

from tests.sglang.kit import content, rust_core
from tests.sglang.kit.content import POOL_OF, Prompt, Share
from tests.sglang.kit.proxies import Ledger, PageId

TIMEOUT = 60.0
IO_OF = {"page_first_direct": "direct"}


@dataclass(frozen=True)
class Backend:
    """A storage backend by SGLang's name for it, and the extra config that makes it keep its data in a folder."""

    name: str
    extra: Callable[[Path], dict[str, Any]]

    def config(self, folder: Path, **more: Any) -> str:
        """The JSON of ``--hicache-storage-backend-extra-config``; prefetches from one page on."""
        return json.dumps({"prefetch_threshold": 1, **self.extra(folder), **more})


def _umbp(folder: Path) -> dict[str, Any]:
    return {
        "dram_capacity": "16MiB",
        "ssd_dir": str(folder),
        "ssd_capacity": "64MiB",
        "dram_prefault": False,
        "call_timeout_ms": 60_000,
    }


FILE = Backend("file", lambda folder: {"file_storage_path": str(folder)})
UMBP = Backend("umbp", _umbp)
DYNAMIC = Backend(
    "dynamic",
    lambda folder: {
        "backend_name": "umbp",
        "module_path": "umbp_sglang.store",
        "class_name": "UMBPStore",
        "interface_v1": 1,
        **_umbp(folder),
    },
)


def copied(backend: Backend) -> Backend:
    """The same without SGLang's switch for pages in place, so that it hands over copies of them."""
    return Backend(backend.name, lambda folder: {**backend.extra(folder), "interface_v1": 0})


@dataclass(frozen=True)
class Setup:
    """What one engine is started with."""

    backend: Backend
    cfg: CacheConfig
    layout: str = "page_first"
    memory: str = "cache"
    model: str = "tiny"
    mla: bool = False
    indexer: bool = False
    tp: tuple[int, int] = (0, 1)
    core: str = "python"
    """Which of SGLang's two trees; ``rust`` is what servers use."""
    events: str | None = None
    """``--kv-events-config``."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def scope(self) -> str:
        """Engines with the same scope may read each other's pages; others must not."""
        rank = "replicated" if self.mla else f"{self.tp[0]}of{self.tp[1]}"
        return f"{self.model}/{self.layout}/{self.cfg.label}/{self.cfg.num_layers}/{self.cfg.dtype}/{rank}"


class Kit(UnifiedRadixCacheStorageFixtures, unittest.TestCase):
    """The kit's fixtures as an object: it lends its methods, and cleans up after its engine.

    Its own longer steps start caches themselves, with the file backend by its name: they get the backend of the
    setup instead, and an earlier cache is stopped first, because a folder of ours has one owner at a time.
    """

    __test__ = False

    def __init__(self, setup: Setup) -> None:
        super().__init__("runTest")
        self.setup_of = setup
        self.cfg = setup.cfg
        self._caches: list[Any] = []

    def runTest(self) -> None:  # noqa: N802
        """Nothing: a test function drives the kit."""

    def _init_hicache(self, cache: Any, **options: Any) -> None:
        for earlier in self._caches:
            earlier.shutdown()
        self._caches.append(cache)
        setup, folder = self.setup_of, options.get("storage_dir")

        def with_ours(**given: Any) -> ServerArgs:
            ours = {"hicache_mem_layout": setup.layout, "hicache_io_backend": IO_OF.get(setup.layout, "kernel")}
            if folder is not None:
                ours["hicache_storage_backend"] = setup.backend.name
                ours["hicache_storage_backend_extra_config"] = setup.backend.config(Path(folder), **setup.extra)
            return ServerArgs(**{**given, **ours})

        with mock.patch.object(mixins, "ServerArgs", with_ours):
            super()._init_hicache(cache, **options)


class Engine:
    """One server's caches, from start to end."""

    def __init__(self, setup: Setup, folder: Path, pages: dict[PageId, bytes], faults: list[str]) -> None:
        self.setup = setup
        self.folder = folder
        self.kit = Kit(setup)
        self.wrap: Callable[[Any], Any] = lambda backend: backend
        self.ledger: Ledger | None = None
        self.names = KvEventLoraNames()
        self._pages, self._faults = pages, faults
        self._requests = 0

    # ---- life

    def start(self, *, attach: bool = True, ledger: bool = True) -> None:
        """Builds the pools and the tree and attaches the backend, as a server's start does."""
        pool = _dsa_pool if self.setup.indexer else _mla_pool if self.setup.mla else fixtures.MHATokenToKVPool
        with mock.patch.object(fixtures, "MHATokenToKVPool", pool), rust_core.as_the_kits():
            self.cache, self.allocator, self.reqs = fixtures.build_fixture(
                self.setup.cfg,
                enable_kv_cache_events=self.setup.events is not None,
                tree_core_backend=self.setup.core,
                kv_event_lora_names=self.names,
            )
        args = self._server_args(attach)
        observed = self._observed() if ledger else contextlib.nullcontext()
        with self._as_rank(), observed:
            self.cache.init_hicache(args, self.cache.cache_init_params)
        for entry in self.cache.host_pool_group.entries:
            entry.host_pool.pin_memory = False  # there is no device to pin it for
        self.kit.addCleanup(fixtures.drop_hicache_atexit_pin, self.cache)
        self.kit.addCleanup(self.cache.release_host_resources)
        self.kit.addCleanup(self.stop)
        self.cache.write_through_threshold = 1 << 30
        self.cache.load_back_threshold = 0
        self._after_attach()

    def attach(self, backend: Backend | None = None, **more: Any) -> tuple[bool, str]:
        """Attaches at run time, as the admin API does."""
        backend = backend or self.setup.backend
        with self._as_rank(), self._observed():
            done = self.cache.attach_storage_backend(
                backend.name, backend.config(self.folder, **self.setup.extra, **more), self.setup.model
            )
        self._after_attach()
        return done

    def detach(self) -> tuple[bool, str]:
        """Detaches at run time, as the admin API does."""
        return self.cache.detach_storage_backend()

    def stop(self) -> None:
        """What the server does at its exit; may be called twice."""
        self.cache.shutdown()

    def flush(self) -> None:
        """``/flush_cache``: the device and host pools are empty afterwards, the storage is not."""
        self.cache.reset()
        self.allocator.clear()
        self.reqs.clear()

    def close(self) -> None:
        """Stops and frees everything."""
        self.kit.doCleanups()

    # ---- what a scheduler does

    def compute(self, prompt: Prompt, *, window_from: int | None = None) -> None:
        """A prefill: the tokens go into the tree, and their slots hold what belongs there.

        With ``window_from`` the sliding window left the tokens before that position behind, as it does in a
        long prompt: they keep their full attention pages and have no others.
        """
        if window_from is None:
            self.kit._insert(
                self.cache,
                self.allocator,
                self.reqs,
                list(prompt.tokens),
                extra_key=prompt.extra_key,
                cache_salt=prompt.cache_salt,
            )
        else:
            value = self.kit._alloc(self.allocator, len(prompt))
            gone = {ComponentType.SWA: window_from}
            self.cache.insert(InsertParams(key=_key(prompt), value=value, component_evicted_seqlens=gone))
            self.allocator.free_swa(value[:window_from])
        for name, tensor, slots, want in self._device(prompt):
            rows = want.view(tensor.dtype).reshape(len(slots), *tensor.shape[1:])
            tensor[slots] = rows
            assert torch.equal(content.as_bytes(tensor[slots]), want), name

    def offload(self, prompt: Prompt) -> None:
        """Device to host to storage, and waits for all acknowledgements."""
        leaf = self.match(prompt).last_device_node
        pipeline = self.cache.buffer_pipeline
        if pipeline is not None:
            fixtures.write_backup(self.cache, leaf)
            self.kit._pump_hicache_until(
                self.cache,
                lambda: not (pipeline.inflight_backup_node_ids or pipeline.ongoing_backup),
                "what waits to be stored was not stored",
                TIMEOUT,
            )
            return
        self.kit._backup_node(self.cache, leaf)
        self.kit._write_path_to_l3(self.cache, leaf)
        self.kit._flush_l3_backups(self.cache, timeout=TIMEOUT)

    def prefetch(self, prompt: Prompt) -> int:
        """Storage to host (in buffer mode on to the device); how many tokens came."""
        found = self.match(prompt)
        buffered = self.setup.memory == "buffer_only"
        node = found.last_device_node if buffered else found.last_host_node
        have = found.device_prefix_len + found.host_hit_length
        self._requests += 1
        request = CacheRequestHandle(f"request-{self._requests}", 0)
        self.cache.prefetch_from_storage(
            request,
            node,
            array("q", prompt.tokens[have:]),
            self.cache.get_last_hash_value(node),
            None,
            matched_prefix_tokens=array("q", prompt.tokens[:have]),
            extra_key=prompt.extra_key,
            cache_salt=prompt.cache_salt,
        )
        self._await_prefetch(request, prompt)
        return self.cache.pop_prefetch_loaded_tokens(request)

    def _await_prefetch(self, request: CacheRequestHandle, prompt: Prompt) -> None:
        pipeline = self.cache.buffer_pipeline
        self.kit._pump_hicache_until(
            self.cache, lambda: self.cache.check_prefetch_progress(request), "the prefetch did not end", TIMEOUT
        )
        if pipeline is not None and pipeline.has_staged(request):
            self.kit._consume_staged_prefetch(
                self.cache, request, extra_key=prompt.extra_key, cache_salt=prompt.cache_salt, timeout=TIMEOUT
            )

    def onboard(self, prompt: Prompt) -> int:
        """Host to device; how many tokens of the prompt are on the device then."""
        req = self.kit._make_req(self.reqs)
        match = self.cache.match_prefix(MatchPrefixParams(key=_key(prompt), req=req))
        self.kit._apply_match_to_req(req, match)
        if req.host_hit_length:
            self.cache.init_load_back(
                InitLoadBackParams(best_match_node=req.best_match_node, host_hit_length=req.host_hit_length, req=req)
            )
            self.kit._finish_pending_loads(self.cache)
        return self.match(prompt).device_prefix_len

    def match(self, prompt: Prompt) -> Any:
        """What the tree knows of the prompt."""
        return self.cache.match_prefix(MatchPrefixParams(key=_key(prompt)))

    # ---- checks

    def check_host(self, prompt: Prompt) -> int:
        """Each host page of the prompt's path holds what belongs there; how many tensor rows were compared."""
        compared = 0
        for component, node, positions in self._spans(prompt):
            slots = fixtures.node_host_value(self.cache, node, component)
            if slots is None:
                continue
            pool = self.cache.host_pool_group.entry_map[POOL_OF[component]].host_pool
            for name, rows in content.host_rows(pool, slots):
                got = content.as_bytes(rows)
                want = self._want(component, name, prompt, positions[-len(slots) :], got.shape[1])
                assert torch.equal(got, want), f"{component.name} {name}: host pages {slots.tolist()} hold other bytes"
                compared += len(got)
        return compared

    def check_device(self, prompt: Prompt) -> int:
        """The same for the device's pools."""
        compared = 0
        for name, tensor, slots, want in self._device(prompt):
            assert torch.equal(content.as_bytes(tensor[slots]), want), f"{name}: device slots hold other bytes"
            compared += len(slots)
        return compared

    def _device(self, prompt: Prompt) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Name, tensor, slots and the bytes wanted there, for everything of the prompt that is on the device."""
        for component, node, positions in self._spans(prompt):
            slots = fixtures.node_device_value(self.cache, node, component)
            if slots is None:
                continue
            slots = slots.reshape(-1)
            if self.setup.indexer:
                yield from self._indexer(prompt, slots, positions)
            for name, tensor in content.device_tensors(component, self.allocator, self.reqs):
                width = tensor[0].numel() * tensor.element_size()
                yield (
                    f"{component.name} {name}",
                    tensor,
                    slots,
                    self._want(component, name, prompt, positions[-len(slots) :], width),
                )

    def _indexer(
        self, prompt: Prompt, slots: torch.Tensor, positions: range
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The indexer's device tensors have one row per page."""
        size = self.setup.cfg.page_size
        for layer, tensor in enumerate(self.allocator.get_kvcache().index_k_with_scale_buffer):
            ends = range(positions.start + size, positions.stop + 1, size)
            want = [
                content.expected(
                    "indexer", f"{layer}", prompt.cut(end), range(end - 1, end), 1, tensor.shape[1], Share()
                )
                for end in ends
            ]
            yield f"INDEXER {layer}", tensor, slots[::size] // size, torch.cat(want)

    def _want(self, component: ComponentType, name: str, prompt: Prompt, at: range, width: int) -> torch.Tensor:
        size = self.setup.cfg.page_size
        share = Share() if self.setup.mla else Share(*self.setup.tp)
        if component is ComponentType.MAMBA:
            return content.expected("mamba", name, prompt, range(at.stop - size, at.stop), size, width, share)[:1]
        return content.expected(component.name, name, prompt, at, size, width, share)

    def _spans(self, prompt: Prompt) -> Iterator[tuple[ComponentType, Any, range]]:
        """Each component of each node on the prompt's path, and the positions that the node covers."""
        found = self.match(prompt)
        on_host = found.host_hit_length > 0
        end = 0
        for node in self.kit._path_chain(self.cache, found.last_host_node if on_host else found.last_device_node):
            start, end = end, end + fixtures.node_key_length(self.cache, node)
            for component in self.setup.cfg.components:
                yield component, node, range(start, end)

    # ---- inside

    def _server_args(self, attach: bool) -> ServerArgs:
        setup = self.setup
        args = ServerArgs(
            model_path="dummy",
            served_model_name=setup.model,
            page_size=setup.cfg.page_size,
            hicache_io_backend=IO_OF.get(setup.layout, "kernel"),
            hicache_mem_layout=setup.layout,
            hicache_write_policy="write_through",
            hicache_storage_backend=setup.backend.name if attach else None,
            hicache_storage_backend_extra_config=setup.backend.config(self.folder, **setup.extra),
            hicache_storage_prefetch_policy="wait_complete",
            hicache_host_memory_mode=setup.memory,
        )
        args._mamba_cache_chunk_size = max(CHUNK_SIZE, setup.cfg.page_size)
        set_global_server_args_for_scheduler(args)
        return args

    @contextlib.contextmanager
    def _as_rank(self) -> Iterator[None]:
        rank, size = self.setup.tp
        whole = {"tp_size": size, "attn_tp_size": size, "moe_tp_size": size}
        alone = {"pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_dp_rank": 0, "dp_rank": None}
        with get_parallel().override(tp_rank=rank, attn_tp_rank=rank, **whole, **alone):
            yield

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
        """Every backend that SGLang makes meanwhile is put behind a ledger."""
        create = StorageBackendFactory.create_backend

        def observed(*args: Any, **kwargs: Any) -> Ledger:
            self.backend = create(*args, **kwargs)
            self.ledger = Ledger(self.wrap(self.backend), self._pages, self.setup.scope, self._faults)
            return self.ledger

        with mock.patch.object(StorageBackendFactory, "create_backend", observed):
            yield

    def _after_attach(self) -> None:
        """The kit's host pools are as large as its device pools, which leaves no room to prefetch."""
        controller = self.cache.cache_controller
        if self.ledger is None:
            self.backend = controller.storage_backend
        if controller.enable_storage:
            controller.prefetch_capacity_limit = max(
                controller.prefetch_capacity_limit, controller.mem_pool_host.logical_size
            )


def _key(prompt: Prompt) -> RadixKey:
    return RadixKey(array("q", prompt.tokens), extra_key=prompt.extra_key, cache_salt=prompt.cache_salt)


def _mla_pool(**kwargs: Any) -> MLATokenToKVPool:
    """A latent pool where the kit would make one of keys and values."""
    del kwargs["head_num"], kwargs["head_dim"]
    return MLATokenToKVPool(**kwargs, kv_lora_rank=64, qk_rope_head_dim=16)


def _dsa_pool(**kwargs: Any) -> DSATokenToKVPool:
    """A latent pool with an indexer's pool beside it."""
    del kwargs["head_num"], kwargs["head_dim"]
    return DSATokenToKVPool(**kwargs, kv_lora_rank=64, qk_rope_head_dim=16, index_head_dim=128, kv_cache_dim=80)
