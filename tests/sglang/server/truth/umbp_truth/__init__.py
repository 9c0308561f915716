"""TEST-ONLY plug-in of SGLang: a door through which a test asks a running scheduler what its caches hold.

``ENGINE_TRUTH`` names a folder; each rank listens there on a Unix socket named ``tpN``.  A question is one line of
JSON, a list of documents (tokens, extra key and salt) under whose prefixes everything in the tree lies; the answer is
one line.  It is given by the scheduler's own thread, after a step in which nothing was under way any more: no request,
no copy, no store, no write to SSD.  SGLang has published by then what happened, by its own means.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
from array import array
from pathlib import Path
from typing import Any

FLUSH = 60.0
_ONGOING = ("ongoing_write_through", "ongoing_load_back", "ongoing_prefetch", "ongoing_backup")


def register() -> None:
    """Entry point of ``sglang.srt.plugins``."""
    if "ENGINE_TRUTH" not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    door = Door(Path(os.environ["ENGINE_TRUTH"]))
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.on_idle", door.after_idling, HookType.AFTER)


class Door:
    """Questions wait in a queue until the scheduler has nothing else to do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: queue.SimpleQueue[tuple[list[Any], socket.socket]] = queue.SimpleQueue()
        self._open = False

    def after_idling(self, _result: object, scheduler: Any) -> None:
        """After ``Scheduler.on_idle``."""
        if not self._open:
            self._listen(scheduler)
        if self._waiting.empty() or not settled(scheduler):
            return
        documents, asker = self._waiting.get()
        with asker:
            asker.sendall(json.dumps(truth(scheduler.tree_cache, documents)).encode() + b"\n")

    def _listen(self, scheduler: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        self._open = True
        place = self._folder / f"tp{get_parallel().tp_rank}"
        place.unlink(missing_ok=True)  # that of a server which was killed
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(place))
        server.listen()
        threading.Thread(target=self._accept, args=(server,), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        while True:
            asker, _ = server.accept()
            with asker.makefile("rb") as lines:
                self._waiting.put((json.loads(lines.readline()), asker))


def settled(scheduler: Any) -> bool:
    """Whether nothing is under way."""
    cache = scheduler.tree_cache
    return bool(scheduler.is_fully_idle()) and not any(getattr(cache, name) for name in _ONGOING)


def truth(cache: Any, documents: list[Any]) -> dict[str, Any]:
    """Of every document the spans of its pages and where they are; and what L3 has, by what the storage calls it."""
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    size = cache.page_size
    keys = [RadixKey(array("q", tokens), extra_key=extra, cache_salt=salt) for tokens, extra, salt in documents]
    whole = [key.page_aligned(size) for key in keys]
    nodes: dict[Any, tuple[int, bool, bool]] = {}
    spans = [_spans(cache, key, nodes) for key in keys]
    host = cache.cache_controller.mem_pool_host
    return {
        "spans": spans,
        "stored": [get_storage_hash_str(key, page_size=size) if len(key) else [] for key in whole],
        "pool": _pool(cache.cache_controller.storage_backend),
        # How many there must be, by those who hand the memory out: nothing lies where no document leads.
        "device": [_sum(nodes, 1), cache.total_size()[0] // size],
        "host": [_sum(nodes, 2), (host.logical_size - host.available_size()) // size],
    }


def _spans(cache: Any, key: Any, nodes: dict[Any, tuple[int, bool, bool]]) -> list[tuple[int, int, bool, bool]]:
    """First and last page of each node on the way, and whether the device and the host have it."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

    core, size = cache.tree_core, cache.page_size
    found = cache.match_prefix(MatchPrefixParams(key=key))
    spans = {}
    for end in (found.last_device_node, found.last_host_node):
        for node in core.collect_path_info([end])[0]:
            begin, behind = node.path_start // size, node.path_end // size
            where = node.full_value_len is not None, bool(core.is_backuped(node.node_id))
            spans[begin] = (begin, behind, *where)
            nodes[node.node_id] = (behind - begin, *where)
    return list(spans.values())


def _pool(store: Any) -> dict[str, list[str]]:
    """Tier to storage hashes, as the pool's own books have them; after all that it wanted to write is written."""
    if store is None or store._pools.get("kv") is None:
        return {}
    (shard,) = store._pools.get("kv").shards
    if not shard.flush(FLUSH):
        raise RuntimeError("the pool does not settle")
    return {tier.name: [key.hex() for key in keys] for tier, keys in shard.holdings().items()}


def _sum(nodes: dict[Any, tuple[int, bool, bool]], where: int) -> int:
    return sum(pages for pages, *there in nodes.values() if there[where - 1])
