"""The leader's side of the SSD folder over restarts."""

from __future__ import annotations

from pathlib import Path

from umbp_connectors.leader.ssd import SsdCatalogue, open_ssd_catalogue
from umbp_core.directory import Directory, TierSpace
from umbp_core.eviction import LruPolicy
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier

LAYOUTS = (b"l" * 32,)


def directory(slots: int = 8) -> Directory:
    return Directory([TierSpace(Tier.SSD, PageAllocator(4096, [slots * 4096]), LruPolicy())])


def opened(folder: Path, *, slots: int = 8) -> SsdCatalogue:
    catalogue = open_ssd_catalogue(folder, "model", layouts=LAYOUTS, slots=slots, slot_bytes=[4096])
    assert catalogue is not None
    return catalogue


def put(node: Directory, *keys: bytes) -> None:
    for key in keys:
        assert node.reserve("put", key, Tier.SSD, 100) is not None
        node.commit("put", key, Tier.SSD, key[:1] * 16)


def test_a_restart_finds_what_was_there_and_not_what_was_dropped(tmp_path: Path) -> None:
    node = directory()
    catalogue = opened(tmp_path)
    assert catalogue.restore(node) == 0
    put(node, b"a-key", b"b-key", b"c-key")
    node.drop(b"b-key", Tier.SSD)
    catalogue.follow(node.drain_changes())
    catalogue.close()
    catalogue.close()

    again = directory()
    catalogue = opened(tmp_path)
    assert catalogue.restore(again) == 2
    assert again.contains_many([b"a-key", b"b-key", b"c-key"]) == [True, False, True]
    assert again.copy(b"a-key", Tier.SSD) == node.copy(b"a-key", Tier.SSD)
    assert again.drain_events() == []
    catalogue.close()


def test_fewer_slots_keep_what_fits(tmp_path: Path) -> None:
    node = directory()
    catalogue = opened(tmp_path)
    put(node, b"a-key", b"b-key", b"c-key")
    catalogue.follow(node.drain_changes())
    catalogue.close()

    smaller = directory(slots=1)
    catalogue = opened(tmp_path, slots=1)
    assert catalogue.restore(smaller) == 1
    assert smaller.contains_many([b"a-key", b"b-key", b"c-key"]) == [True, False, False]
    catalogue.close()


def test_a_second_leader_goes_on_without_ssd(tmp_path: Path) -> None:
    catalogue = opened(tmp_path)
    assert open_ssd_catalogue(tmp_path, "model", layouts=LAYOUTS, slots=8, slot_bytes=[4096]) is None
    catalogue.close()
    opened(tmp_path).close()


def test_an_unusable_folder_means_no_ssd(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert open_ssd_catalogue(file / "below", "model", layouts=LAYOUTS, slots=8, slot_bytes=[4096]) is None
