"""``mori.umbp`` over this pool: the names that SGLang's in-tree backend ``mori`` and its host allocator use.

``import umbp_connectors.compat.mori as umbp`` in place of ``import mori.umbp as umbp``; or, where the import cannot be
changed, :func:`install` before it.  What differs: a get is verified, ``flush`` is a barrier, memory need not be
registered, and all objects of a client fit pages of one size: that of ``UMBPConfig.object_bytes``, or of the largest
object in the first put.  What an earlier life left is there again where ``UMBPConfig.namespace`` says whose it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from umbp_connectors.compat.mori_config import (
    UMBPConfig,
    UMBPCopyPipelineConfig,
    UMBPDeploymentMode,
    UMBPDistributedConfig,
    UMBPDramConfig,
    UMBPDurabilityConfig,
    UMBPDurabilityMode,
    UMBPEvictionConfig,
    UMBPIoBackend,
    UMBPIoConfig,
    UMBPIoEngineConfig,
    UMBPMasterClientConfig,
    UMBPRole,
    UMBPSsdConfig,
    UMBPStandaloneProcessConfig,
    UMBPTierType,
)
from umbp_connectors.compat.mori_keys import extra_of
from umbp_connectors.compat.mori_memory import UMBPHostBufferBacking, UMBPHostMemAllocator
from umbp_connectors.config import resolve
from umbp_connectors.create import create_client, open_external
from umbp_connectors.pool.buffers import memory_at, round_up
from umbp_connectors.pool.inspection import find_catalogues
from umbp_connectors.pool.rows import ObjectRows
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_connectors.pool.umbp_client import Client, ExternalKv
from umbp_core.errors import ConfigError, StateError
from umbp_core.ids import Identity, RankScope, digest_of

__all__ = [
    "UMBPClient",
    "UMBPConfig",
    "UMBPCopyPipelineConfig",
    "UMBPDeploymentMode",
    "UMBPDistributedConfig",
    "UMBPDramConfig",
    "UMBPDurabilityConfig",
    "UMBPDurabilityMode",
    "UMBPEvictionConfig",
    "UMBPExternalKvHitCountEntry",
    "UMBPExternalKvMatch",
    "UMBPHostBufferBacking",
    "UMBPHostMemAllocator",
    "UMBPIoBackend",
    "UMBPIoConfig",
    "UMBPIoEngineConfig",
    "UMBPMasterClientConfig",
    "UMBPRole",
    "UMBPSsdConfig",
    "UMBPStandaloneProcessConfig",
    "UMBPTierType",
    "install",
]

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

NAMESPACE = "mori"
_FLUSH_S = 30.0
_MODES = {
    "local": UMBPDeploymentMode.Local,
    "daemon": UMBPDeploymentMode.StandaloneProcess,
    "distributed": UMBPDeploymentMode.Distributed,
}


@dataclass(frozen=True)
class UMBPExternalKvMatch:
    """What one node holds of the hashes that were asked about, tiers in the order of speed."""

    node_id: str
    peer_address: str
    hashes_by_tier: dict[UMBPTierType | int, list[str]]

    def matched_hash_count(self) -> int:
        """How many different hashes."""
        return len(set().union(*self.hashes_by_tier.values()))


@dataclass(frozen=True)
class UMBPExternalKvHitCountEntry:
    """How often a hash was matched as a hit."""

    hash: str
    hit_count_total: int


class UMBPClient:
    """The original's client, with its calls about memory by address.  Any thread.

    The pool is opened with the first put, or at once where an earlier life of its namespace left objects on SSD; when
    larger ones are put then, these are given up.  Raises ``ConfigError`` for a configuration that cannot be used; calls
    about objects raise nothing that the configuration does not cause.
    """

    def __init__(self, config: UMBPConfig) -> None:
        config.validate()
        self._config = config
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._closed = False
        self._settings = resolve(extra_of(config), env={}).config
        self._external = ExternalKv()
        self._namespace = f"{NAMESPACE}/{config.namespace}" if config.namespace else NAMESPACE
        self._left_bytes = 0 if config.object_bytes else _stored_bytes(config, self._namespace)
        """What the objects of an earlier life need, until the first put says what this one's do."""
        object_bytes = config.object_bytes or self._left_bytes
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            if object_bytes:
                self._open(object_bytes)
            self._external = open_external(self._settings)
            undo.pop_all()

    def put_from_ptr(self, key: str, src: int, size: int) -> bool:
        """Store the ``size`` bytes at ``src``."""
        return self.batch_put_from_ptr([key], [src], [size])[0]

    def get_into_ptr(self, key: str, dst: int, size: int) -> bool:
        """Fill the ``size`` bytes at ``dst``."""
        return self.batch_get_into_ptr([key], [dst], [size])[0]

    def exists(self, key: str) -> bool:
        """Whether the object can be read now."""
        return self.batch_exists([key])[0]

    def batch_put_from_ptr(self, keys: Sequence[str], srcs: Sequence[int], sizes: Sequence[int]) -> list[bool]:
        """Store many objects; true for those that are there now."""
        return self.batch_put_from_ptr_with_depth(keys, srcs, sizes, [])

    def batch_put_from_ptr_with_depth(
        self, keys: Sequence[str], srcs: Sequence[int], sizes: Sequence[int], depths: Sequence[int]
    ) -> list[bool]:
        """The same with places in prefix chains; empty or -1: not known."""
        if not len(keys) == len(srcs) == len(sizes):
            raise ValueError(f"{len(keys)} keys, {len(srcs)} addresses and {len(sizes)} sizes do not match")
        if not keys:
            return []
        self._fit(max(sizes))
        return self._ask(
            lambda client: [each.kept for each in client.batch_put_with_depth(keys, _memory(srcs, sizes), depths)],
            [False] * len(keys),
        )

    def batch_get_into_ptr(self, keys: Sequence[str], dsts: Sequence[int], sizes: Sequence[int]) -> list[bool]:
        """Fill many buffers; true for those that hold their object now."""
        if not len(keys) == len(dsts) == len(sizes):
            raise ValueError(f"{len(keys)} keys, {len(dsts)} addresses and {len(sizes)} sizes do not match")
        if not keys:
            return []
        return self._ask(
            lambda client: [each.hit for each in client.batch_get(keys, _memory(dsts, sizes))],
            [False] * len(keys),
        )

    def batch_exists(self, keys: Sequence[str]) -> list[bool]:
        """Which objects can be read now."""
        return self._ask(lambda client: client.batch_exists(keys), [False] * len(keys))

    def batch_exists_consecutive(self, keys: Sequence[str]) -> int:
        """How many, before the first that cannot."""
        return self._ask(lambda client: client.batch_exists_consecutive(keys), 0)

    def clear(self) -> bool:
        """Forget every object."""
        if not self._ask(lambda client: client.clear(), True):
            return False
        self._external.clear_all()
        return True

    def flush(self) -> bool:
        """Wait until everything is on SSD, if there is one, and the master knows what it was told."""
        deadline = time.monotonic() + _FLUSH_S
        stored = self._ask(lambda client: client.flush(_FLUSH_S), True)
        return self._external.flush(max(0.0, deadline - time.monotonic())) and stored

    def close(self) -> None:
        """Give everything back; idempotent."""
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        self._external.close()
        if client is not None:
            client.close()

    def is_distributed(self) -> bool:
        """Whether objects of other nodes can be read."""
        return self._settings.mode == "distributed"

    def get_deployment_mode(self) -> UMBPDeploymentMode:
        """Who owns the bytes."""
        return _MODES[self._settings.mode]

    def get_backend_mode(self) -> str:
        """The same in a word."""
        return self._settings.mode

    def supports_ranged_io(self) -> bool:
        """Parts of objects are not read or written on their own."""
        return False

    def batch_get_ranges_into_ptr(
        self, keys: Sequence[str], ptrs: Sequence[object], sizes: Sequence[object], offsets: Sequence[object]
    ) -> list[bool]:
        """False for each, as :meth:`supports_ranged_io` says."""
        return _no_ranges("batch_get_ranges_into_ptr", keys)

    def batch_put_ranges_from_ptr(
        self,
        keys: Sequence[str],
        object_sizes: Sequence[int],
        ptrs: Sequence[object],
        sizes: Sequence[object],
        offsets: Sequence[object],
    ) -> list[bool]:
        """False for each, as :meth:`supports_ranged_io` says."""
        return _no_ranges("batch_put_ranges_from_ptr", keys)

    def register_memory(self, ptr: int, size: int) -> bool:
        """Nothing has to be registered; true when it could be memory."""
        return ptr > 0 and size > 0

    def deregister_memory(self, ptr: int) -> None:
        """Nothing was registered."""

    def report_external_kv_blocks(self, hashes: Sequence[str], tier: int) -> bool:
        """Tell the master that this node holds blocks; true without a master."""
        self._external.report(hashes, int(tier))
        return True

    def revoke_external_kv_blocks(self, hashes: Sequence[str], tier: int) -> bool:
        """Tell it that it does not any more."""
        self._external.revoke(hashes, int(tier))
        return True

    def revoke_all_external_kv_blocks_at_tier(self, tier: int) -> bool:
        """Tell it that nothing is left in ``tier``."""
        self._external.clear(int(tier))
        return True

    def match_external_kv(self, hashes: Sequence[str], count_as_hit: bool = False) -> list[UMBPExternalKvMatch]:
        """Who holds which of ``hashes``."""
        return [
            UMBPExternalKvMatch(
                match.node_id,
                match.peer_address,
                {_tier(tier): [each.decode() for each in match.tiers[tier]] for tier in sorted(match.tiers)},
            )
            for match in self._external.match(hashes, count_as_hit)
        ]

    def get_external_kv_hit_counts(self, hashes: Sequence[str]) -> list[UMBPExternalKvHitCountEntry]:
        """How often each was matched as a hit."""
        counts = self._external.hit_counts(hashes)
        return [UMBPExternalKvHitCountEntry(each.decode(), count) for each, count in counts]

    def _ask(self, question: Callable[[Client], Answer], missing: Answer) -> Answer:
        """What the client says; ``missing`` when there is none, or none any more."""
        client = self._client
        if client is None:
            return missing
        try:
            return question(client)
        except StateError:  # closed meanwhile, or given up for larger objects
            return missing

    def _fit(self, object_bytes: int) -> None:
        """A client for objects of that size, if the last put was none: larger ones do not fit an earlier life's."""
        with self._lock:
            left, self._left_bytes = self._left_bytes, 0
            old = self._client
            if 0 < left < object_bytes and old is not None:
                logger.warning(
                    "umbp: objects have %d bytes now, and those of an earlier life had %d at most; they are given up",
                    *(object_bytes, left),
                )
                self._client = None
                old.close()
        self._open(object_bytes)

    def _open(self, object_bytes: int) -> None:
        """Open the client for objects of that size, if it is not open already or closed."""
        with self._lock:
            if self._client is not None or self._closed:
                return
            page = round_up(object_bytes, ALIGNMENT)
            layout = digest_of({"compat": NAMESPACE, "page_bytes": page})
            client = create_client(
                self._settings,
                identity=Identity(self._namespace, layout, RankScope()),
                object_bytes=page,
                external=ExternalKv(),
            )
            if not self._config.namespace:
                # Nobody knows whose an earlier life's are.  What the disk does not forget, this pool has forgotten.
                client.clear()
            self._client = client


def install() -> ModuleType:
    """Make ``import mori.umbp`` give this module.  Raises ``ConfigError`` when the real one is installed."""
    here = sys.modules[__name__]
    if sys.modules.get("mori.umbp") is here:
        return here
    if "mori" in sys.modules or importlib.util.find_spec("mori") is not None:
        raise ConfigError("mori is installed; remove it, or import umbp_connectors.compat.mori in its place")
    package = ModuleType("mori", "Stands for the original: only `umbp` is here.")
    package.__path__ = []
    package.__dict__["umbp"] = here
    sys.modules["mori"] = package
    sys.modules["mori.umbp"] = here
    return here


def _stored_bytes(config: UMBPConfig, namespace: str) -> int:
    """The page size of what an earlier life left on SSD for this one; 0 when there is nothing."""
    folder = Path(config.ssd.storage_dir)
    if not config.namespace or not config.ssd.enabled or not folder.is_dir():
        return 0
    found = [each for each in find_catalogues(folder) if each.namespace == namespace]
    return max((each.slot_bytes for each in found), default=0)


def _no_ranges(call: str, keys: Sequence[str]) -> list[bool]:
    logger.warning("umbp: %s of %d keys does nothing: parts of objects are not moved here", call, len(keys))
    return [False] * len(keys)


def _tier(number: int) -> UMBPTierType | int:
    return UMBPTierType(number) if number in set(UMBPTierType) else number


def _memory(addresses: Sequence[int], sizes: Sequence[int]) -> Any:
    """The memory at ``addresses``: rows of one array where they are of one size and lie in steps of it."""
    size = sizes[0]
    first = min(addresses)
    places = np.asarray(addresses, dtype=np.int64) - first
    if len(set(sizes)) > 1 or size <= 0 or (places % size).any():
        return list(zip(addresses, sizes, strict=True))
    whole = memory_at(first, int(places.max()) + size).reshape(-1, size)
    return ObjectRows(whole, (places // size).tolist())
