"""A storage backend that passes everything on, and the one that remembers what it passed."""

from __future__ import annotations

import threading
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

Results = dict[str, list[bool]]
PageId = tuple[str, str, str]  # scope, pool, key
POISON = 0xA5
"""What a page holds before a backend reads into it, so that a page it leaves alone is not right by chance."""


class Proxy(HiCacheStorage):
    """Passes each call to ``backend``; a subclass changes what it wants to change."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.registered_pools: dict[str, Any] = {}

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self.backend.register_mem_pool_host(mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self.backend.register_mem_host_pool_v2(host_pool, host_pool_name)

    def on_host_pools_registered(self) -> None:
        self.backend.on_host_pools_registered()

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return self.backend.batch_exists(keys, extra_info)

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[PoolTransfer] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        return self.backend.batch_exists_v2(keys, pool_transfers, extra_info)

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self.backend.batch_get_v1(keys, host_indices, extra_info)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self.backend.batch_set_v1(keys, host_indices, extra_info)

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> Results:
        return self.backend.batch_get_v2(transfers, extra_info)

    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> Results:
        return self.backend.batch_set_v2(transfers, extra_info)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        return self.backend.get(key, target_location, target_sizes)

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        return self.backend.batch_get(keys, target_locations, target_sizes)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.backend.set(key, value, target_location, target_sizes)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return self.backend.batch_set(keys, values, target_locations, target_sizes)

    def exists(self, key: str) -> bool:
        return self.backend.exists(key)

    def clear(self) -> None:
        self.backend.clear()

    def get_stats(self) -> Any:
        return self.backend.get_stats()

    def close(self) -> None:
        close = getattr(self.backend, "close", None)  # SGLang's own backends need not have one
        if close is not None:
            close()


class Ledger(Proxy):
    """Remembers the bytes of each page that the backend took, and compares each page that it gives back.

    Complaints are kept in ``faults``, because SGLang catches what a backend raises.  ``pages`` may be shared by
    the backends that come after one another over the same stored data; ``scope`` tells apart those that must
    not see each other's pages.
    """

    def __init__(self, backend: Any, pages: dict[PageId, bytes], scope: str, faults: list[str]) -> None:
        super().__init__(backend)
        self.pages = pages
        self.scope = scope
        self.faults = faults
        self.given: list[PageId] = []
        self._lock = threading.Lock()

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        self._offer(PoolName.KV, keys, self._read(self.mem_pool_host, host_indices))
        return super().batch_set_v1(keys, host_indices, extra_info)

    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> Results:
        for transfer in transfers:
            pool = self.registered_pools[transfer.name]
            self._offer(transfer.name, transfer.keys or [], self._read(pool, transfer.host_indices))
        return super().batch_set_v2(transfers, extra_info)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        self._offer(PoolName.KV, keys, [raw(value) for value in values])
        return super().batch_set(keys, values, target_locations, target_sizes)

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        self._poison(self.mem_pool_host, host_indices)
        results = super().batch_get_v1(keys, host_indices, extra_info)
        self._compare(PoolName.KV, keys, self._read(self.mem_pool_host, host_indices), results)
        return results

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> Results:
        for transfer in transfers:
            self._poison(self.registered_pools[transfer.name], transfer.host_indices)
        results = super().batch_get_v2(transfers, extra_info)
        for transfer in transfers:
            got = self._read(self.registered_pools[transfer.name], transfer.host_indices)
            self._compare(transfer.name, transfer.keys or [], got, results.get(transfer.name, []))
        return results

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        results = super().batch_get(keys, target_locations, target_sizes)
        got = [b"" if page is None else raw(page) for page in results]
        self._compare(PoolName.KV, keys, got, [page is not None for page in results])
        return results

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        found = super().batch_exists(keys, extra_info)
        self._believe(PoolName.KV, keys[:found], found <= len(keys))
        return found

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[PoolTransfer] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        result = super().batch_exists_v2(keys, pool_transfers, extra_info)
        legal = set(result.restorable_prefix_pages or [result.kv_hit_pages])
        self._believe(PoolName.KV, keys[: result.kv_hit_pages], result.kv_hit_pages <= len(keys))
        for transfer in pool_transfers or []:
            for end in legal - {0}:
                trailing = transfer.hit_policy is PoolHitPolicy.TRAILING_PAGES
                start = max(0, end - len(transfer.keys or [""])) if trailing else 0
                self._believe(transfer.name, keys[start:end], True)
        return result

    def _offer(self, pool: str, keys: list[str], pages: list[bytes]) -> None:
        """Each page is noted when it is offered: from then on the backend may have it, and must have it as it is."""
        with self._lock:
            for key, page in zip(keys, pages, strict=True):
                before = self.pages.setdefault((self.scope, str(pool), key), page)
                if before != page:
                    self.faults.append(f"{pool} {key[:8]} is offered with other bytes than before")

    def _compare(self, pool: str, keys: list[str], pages: list[bytes], results: list[bool]) -> None:
        if len(results) != len(keys):
            self.faults.append(f"{pool}: {len(results)} results for {len(keys)} keys")
            return
        with self._lock:
            for key, page, given in zip(keys, pages, results, strict=True):
                if not given:
                    continue
                self.given.append((self.scope, str(pool), key))
                want = self.pages.get((self.scope, str(pool), key))
                if want is None:
                    self.faults.append(f"{pool} {key[:8]} was given, though it was never offered")
                elif want != page:
                    self.faults.append(f"{pool} {key[:8]} came back with other bytes")

    def _believe(self, pool: str, keys: list[str], plausible: bool) -> None:
        with self._lock:
            unknown = [key[:8] for key in keys if (self.scope, str(pool), key) not in self.pages]
        if unknown or not plausible:
            self.faults.append(f"{pool} {unknown} exist, though they were never offered")

    def _read(self, pool: Any, host_indices: torch.Tensor) -> list[bytes]:
        return [raw(pool.get_data_page(index, flat=True)) for index in first_slots(pool, host_indices)]

    def _poison(self, pool: Any, host_indices: torch.Tensor) -> None:
        for index in first_slots(pool, host_indices):
            blank = torch.empty_like(pool.get_data_page(index, flat=True))
            blank.view(torch.uint8).fill_(POISON)
            pool.set_from_flat_data_page(index, blank)


def first_slots(pool: Any, host_indices: torch.Tensor) -> list[int]:
    """The first slot of each page of ``pool`` among ``host_indices``."""
    return host_indices[:: pool.page_size].tolist()


def raw(page: torch.Tensor) -> bytes:
    """The bytes of a flat page."""
    return page.contiguous().view(torch.uint8).numpy().tobytes()
