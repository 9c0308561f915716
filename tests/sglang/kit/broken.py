"""Storage backends with one fault each, put between SGLang and a backend that works; the kit must notice every one."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolTransfer, PoolTransferResult

from tests.sglang.kit.proxies import Proxy, Results, first_slots


class Damaging(Proxy):
    """Base of those that spoil what was read: ``damage`` gets the pool and the first slots of its pages."""

    def damage(self, pool: Any, slots: list[int]) -> None:
        raise NotImplementedError

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        results = super().batch_get_v1(keys, host_indices, extra_info)
        if all(results):
            self.damage(self.mem_pool_host, first_slots(self.mem_pool_host, host_indices))
        return results

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        pages = super().batch_get(keys, target_locations, target_sizes)
        return self.damage_flat([page.clone() for page in pages]) if None not in pages else pages

    def damage_flat(self, pages: list[torch.Tensor]) -> list[torch.Tensor]:
        raise NotImplementedError


class FlipsABit(Damaging):
    """One bit of the last page is wrong."""

    def damage(self, pool: Any, slots: list[int]) -> None:
        page = pool.get_data_page(slots[-1], flat=True).clone()
        page.view(torch.uint8)[-1] ^= 1
        pool.set_from_flat_data_page(slots[-1], page)

    def damage_flat(self, pages: list[torch.Tensor]) -> list[torch.Tensor]:
        pages[-1].view(torch.uint8)[-1] ^= 1
        return pages


class SwapsPages(Damaging):
    """The first page holds the last one's bytes and the other way round."""

    def damage(self, pool: Any, slots: list[int]) -> None:
        first, last = (pool.get_data_page(slot, flat=True).clone() for slot in (slots[0], slots[-1]))
        pool.set_from_flat_data_page(slots[0], last)
        pool.set_from_flat_data_page(slots[-1], first)

    def damage_flat(self, pages: list[torch.Tensor]) -> list[torch.Tensor]:
        return [pages[-1], *pages[1:-1], pages[0]]


class MixesUpKeysAndValues(Damaging):
    """The first half of the last page is where the second half belongs."""

    def damage(self, pool: Any, slots: list[int]) -> None:
        page = pool.get_data_page(slots[-1], flat=True).clone()
        pool.set_from_flat_data_page(slots[-1], page.roll(page.numel() // 2))

    def damage_flat(self, pages: list[torch.Tensor]) -> list[torch.Tensor]:
        return [*pages[:-1], pages[-1].roll(pages[-1].numel() // 2)]


class ReadsNothing(Proxy):
    """Says that it read, and did not."""

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return [True] * len(keys)

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        return target_locations


class ClaimsEverything(Proxy):
    """Says that every page exists."""

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return len(keys)

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[PoolTransfer] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        hits = {transfer.name: len(keys) for transfer in pool_transfers or []}
        return PoolTransferResult(len(keys), hits, list(range(1, len(keys) + 1)))


class ForgetsWrites(Proxy):
    """Says that it wrote, and did not."""

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return [True] * len(keys)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return True


class CountsOneTooMany(Proxy):
    """Finds one page more than there is."""

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return min(len(keys), super().batch_exists(keys, extra_info) + 1)


class ShortensKeys(Proxy):
    """Looks at the first digit of a key only, as a backend does whose keys say too little."""

    @staticmethod
    def cut(keys: list[str]) -> list[str]:
        return [key[0] * len(key) for key in keys]

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return super().batch_exists(self.cut(keys), extra_info)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return super().batch_set_v1(self.cut(keys), host_indices, extra_info)

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return super().batch_get_v1(self.cut(keys), host_indices, extra_info)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return super().batch_set(self.cut(keys), values, target_locations, target_sizes)

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        return super().batch_get(self.cut(keys), target_locations, target_sizes)


class SpoilsTheSidecar(Proxy):
    """The side pool's last page has one wrong bit."""

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> Results:
        results = super().batch_get_v2(transfers, extra_info)
        for transfer in transfers:
            pool = self.registered_pools[transfer.name]
            last = first_slots(pool, transfer.host_indices)[-1]
            page = pool.get_data_page(last, flat=True).clone()
            page.view(torch.uint8)[0] ^= 1
            pool.set_from_flat_data_page(last, page)
        return results


class TakesTheAnchorForTheSidecar(Proxy):
    """Answers for the side pools what it knows of the main one: every prefix could be restored."""

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[PoolTransfer] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        found = self.backend.batch_exists(keys, extra_info)
        return PoolTransferResult(found, {t.name: found for t in pool_transfers or []}, list(range(1, found + 1)))


class DropsTheSidecar(Proxy):
    """Says that it wrote the side pools' pages, and did not."""

    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> Results:
        return {transfer.name: [True] * len(transfer.keys or []) for transfer in transfers}
