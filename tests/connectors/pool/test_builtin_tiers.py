"""The built-in tiers pass the suites that third parties are given, through the hook that makes tiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from umbp_connectors.config import resolve
from umbp_connectors.hookspecs import DramTierSpec, SsdTierSpec
from umbp_connectors.plugins import create_manager
from umbp_connectors.pool.capacity import catalogue_allowance
from umbp_connectors.tier_ports import DramTier, SsdTier
from umbp_core.testing.suite_tier import DramTierSuite, SlotRunsSuite


def open_arena(page_bytes: int, pages: int, staging_pages: int) -> DramTier:
    host = create_manager(resolve(env={}).config, entries=[])
    return host.make_dram_tier(DramTierSpec(page_bytes, pages, staging_pages))


@dataclass(frozen=True)
class SlabOpener:
    """Opens a slab file in a folder."""

    folder: Path
    options: tuple[tuple[str, object], ...]

    def __call__(self, slot_bytes: int, slots: int) -> SsdTier:
        capacity = slots * slot_bytes + catalogue_allowance(slots, 1)
        extra = {"ssd_dir": str(self.folder), "ssd_capacity": capacity, **dict(self.options)}
        host = create_manager(resolve(extra, env={}).config, entries=[])
        spec = SsdTierSpec("model", b"\x11" * 32, slot_bytes, own_catalogue=True, patience_s=0.0)
        return host.make_ssd_tier(spec)


class TestArena(DramTierSuite):
    @pytest.fixture
    def opener(self) -> Callable[[int, int, int], DramTier]:
        return open_arena


class TestSlab(SlotRunsSuite):
    @pytest.fixture(params=["strict", "batched", "relaxed"])
    def opener(self, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int, int], SsdTier]:
        return SlabOpener(tmp_path, (("ssd_durability", request.param),))


class TestSlabThroughThePageCache(SlotRunsSuite):
    kills = 1

    @pytest.fixture
    def opener(self, tmp_path: Path) -> Callable[[int, int], SsdTier]:
        return SlabOpener(tmp_path, (("ssd_direct_io", False),))
