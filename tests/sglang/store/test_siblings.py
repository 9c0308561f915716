"""KV that all TP ranks hold: the first rank stores it, the others read it from that rank's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from torch import distributed

from tests.sglang.store.conftest import Stores, degraded
from tests.sglang.store.faults import Faults
from tests.sglang.store.pools import MLA_LAYOUTS, contents, hashes, mha_pool, mla_pool, rows, storage_config, wipe


@contextlib.contextmanager
def engine() -> Iterator[None]:
    """In it, this process is a rank of an engine of its own, by the process groups that SGLang makes for one."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def filled(value: int) -> Any:
    pool = mla_pool()
    pool.kv_buffer.view(-1).view(torch.uint8).fill_(value)
    return pool


@pytest.mark.parametrize("layout", MLA_LAYOUTS)
def test_what_the_writer_stores_the_others_read(stores: Stores, layout: str) -> None:
    pool = mla_pool(layout)
    writer = stores(storage_config(mla=True, tp=(0, 4)), pool)
    readers = [stores(storage_config(mla=True, tp=(rank, 4)), mla_pool(layout)) for rank in (1, 3)]
    keys, want = hashes(3), contents(pool, [0, 1, 2])
    assert writer.batch_set_v1(keys, rows(0, 1, 2)) == [True] * 3
    for reader in readers:
        assert reader.batch_exists(keys + hashes(1)) == 3
        wipe(reader.mem_pool_host)
        assert reader.batch_get_v1(keys, rows(4, 5, 6)) == [True] * 3
        assert contents(reader.mem_pool_host, [4, 5, 6]) == want


def test_the_others_store_nothing_and_say_it_is_done(stores: Stores) -> None:
    writer = stores(storage_config(mla=True, tp=(0, 2)), mla_pool())
    reader = stores(storage_config(mla=True, tp=(1, 2)), mla_pool())
    keys = hashes(2)
    assert reader.batch_set_v1(keys, rows(0, 1)) == [True, True]
    assert writer.batch_exists(keys) == reader.batch_exists(keys) == 0


def test_a_state_of_which_each_rank_has_a_part_is_stored_by_each(stores: Stores) -> None:
    """Mamba states beside replicated KV: every rank writes its own, and reads no other's."""
    sides = [mha_pool(heads=1), mha_pool(heads=1)]
    sides[1].kv_buffer.add_(1)
    ranks = [
        stores(storage_config(mla=True, tp=(rank, 2)), mla_pool(), {PoolName.MAMBA: side})
        for rank, side in enumerate(sides)
    ]
    keys = hashes(1)
    for rank, store in enumerate(ranks):
        assert store.batch_set_v2([PoolTransfer(PoolName.MAMBA, rows(3), keys=keys)]) == {PoolName.MAMBA: [True]}
        store.batch_set_v1(keys, rows(3))
        want = contents(sides[rank], [3])
        assert store.batch_get_v2([PoolTransfer(PoolName.MAMBA, rows(9), keys=keys)]) == {PoolName.MAMBA: [True]}
        assert contents(sides[rank], [9]) == want


@pytest.mark.parametrize("name", [PoolName.DRAFT, PoolName.DRAFT_SWA])
def test_a_drafts_heads_are_each_ranks_own(stores: Stores, name: PoolName) -> None:
    """A draft model with heads beside replicated KV: no rank ever gets another's."""
    drafts = [mha_pool(heads=1), mha_pool(heads=1)]
    drafts[1].kv_buffer.add_(1)
    first, second = (
        stores(storage_config(mla=True, tp=(rank, 2)), mla_pool(), {name: draft}) for rank, draft in enumerate(drafts)
    )
    keys, want = hashes(1), [contents(draft, [3]) for draft in drafts]
    assert want[0] != want[1]
    assert first.batch_set_v2([PoolTransfer(name, rows(3), keys=keys)]) == {name: [True]}
    assert first.batch_set_v1(keys, rows(3)) == [True]
    assert second.batch_exists_v2(keys, [PoolTransfer(name, keys=keys)]).kv_hit_pages == 0
    assert second.batch_get_v2([PoolTransfer(name, rows(9), keys=keys)]) == {name: [False]}
    assert second.batch_set_v2([PoolTransfer(name, rows(3), keys=keys)]) == {name: [True]}
    for store, draft, page in zip((first, second), drafts, want, strict=True):
        assert store.batch_exists_v2(keys, [PoolTransfer(name, keys=keys)]).kv_hit_pages == 1
        assert store.batch_get_v2([PoolTransfer(name, rows(9), keys=keys)]) == {name: [True]}
        assert contents(draft, [9]) == page


def test_a_draft_of_latents_is_the_same_on_all_ranks(stores: Stores) -> None:
    draft = mla_pool()
    writer = stores(storage_config(mla=True, tp=(0, 2)), mla_pool(), {PoolName.DRAFT: draft})
    reader = stores(storage_config(mla=True, tp=(1, 2)), mla_pool(), {PoolName.DRAFT: (copy := mla_pool())})
    keys, want = hashes(1), contents(draft, [3])
    writer.batch_set_v2([PoolTransfer(PoolName.DRAFT, rows(3), keys=keys)])
    writer.batch_set_v1(keys, rows(3))
    assert reader.batch_get_v2([PoolTransfer(PoolName.DRAFT, rows(9), keys=keys)]) == {PoolName.DRAFT: [True]}
    assert contents(copy, [9]) == want


def test_a_writer_that_is_gone_makes_misses(stores: Stores) -> None:
    pool = mla_pool()
    writer = stores(storage_config(mla=True, tp=(0, 2)), pool)
    reader = stores(storage_config(mla=True, tp=(1, 2)), mla_pool())
    keys = hashes(1)
    writer.batch_set_v1(keys, rows(0))
    assert reader.batch_exists(keys) == 1
    writer.close()
    assert reader.batch_exists(keys) == 0
    assert reader.batch_get_v1(keys, rows(0)) == [False]
    reader.clear()


def test_what_a_writer_does_not_answer_is_counted(stores: Stores) -> None:
    reader, keys = stores(storage_config(mla=True, tp=(1, 2)), mla_pool()), hashes(1)
    assert degraded(reader) == {}
    assert reader.batch_exists(keys) == 0
    assert degraded(reader) == {"unanswered": 1}
    assert reader.batch_get_v1(keys, rows(0)) == [False]
    assert reader.batch_set_v1(keys, rows(0)) == [True], "nobody is asked"
    assert degraded(reader) == {"unanswered": 2}


def test_a_rank_that_stores_no_kv_holds_none_back(stores: Stores) -> None:
    """Its side pools' pages have no KV pages to wait for, nor to be missed by, however often they find no room."""
    faults, draft, keys = Faults(), mha_pool(heads=1), hashes(3)
    reader = stores(storage_config(mla=True, tp=(1, 2)), mla_pool(), {PoolName.DRAFT: draft}, make_pool=faults.make)
    faults.full = lambda key: True
    for key in keys:
        transfer = PoolTransfer(PoolName.DRAFT, rows(3), keys=[key], indices_from_pool=PoolName.KV)
        assert reader.batch_set_v2([transfer]) == {PoolName.DRAFT: [False]}
    assert reader.batch_set_v1(keys, rows(0, 1, 2)) == [True] * 3, "the writer stores them"


def test_a_writer_that_comes_back_is_found_again(stores: Stores, tmp_path: Path) -> None:
    tiers = {"ssd_dir": str(tmp_path), "ssd_capacity": "32MiB"}
    pool, keys = mla_pool(), hashes(1)
    want = contents(pool, [2])
    first = stores(storage_config(mla=True, tp=(0, 2), extra=tiers), pool)
    first.batch_set_v1(keys, rows(2))
    first.close()
    reader = stores(storage_config(mla=True, tp=(1, 2), extra=tiers), mla_pool())
    assert reader.batch_exists(keys) == 0
    stores(storage_config(mla=True, tp=(0, 2), extra=tiers), mla_pool())
    reader = stores(storage_config(mla=True, tp=(1, 2), extra=tiers), mla_pool())
    assert reader.batch_exists(keys) == 1
    assert reader.batch_get_v1(keys, rows(5)) == [True], "brought from the writer's disk"
    assert contents(reader.mem_pool_host, [5]) == want


def test_engines_whose_ranks_have_one_parent_do_not_meet(stores: Stores) -> None:
    """Two engines in one script, or under Ray: each rank reads what its own engine's writer has."""
    keys = hashes(2)
    with engine():
        one = stores(storage_config(mla=True, tp=(0, 2)), filled(1))
        of_one = stores(storage_config(mla=True, tp=(1, 2)), filled(0))
    with engine():
        two = stores(storage_config(mla=True, tp=(0, 2)), filled(2))
        of_two = stores(storage_config(mla=True, tp=(1, 2)), filled(0))
    assert one.batch_set_v1(keys[:1], rows(0)) == [True]
    assert (of_one.batch_exists(keys), of_two.batch_exists(keys)) == (1, 0)
    assert two.batch_set_v1(keys, rows(0, 1)) == [True, True]
    assert (of_one.batch_exists(keys), of_two.batch_exists(keys)) == (1, 2)
    for reader, value in ((of_one, 1), (of_two, 2)):
        assert reader.batch_get_v1(keys[:1], rows(3)) == [True]
        assert set(contents(reader.mem_pool_host, [3])[0]) == {value}


def test_a_writer_whose_place_is_taken_leaves_nobody_with_the_others_pages(stores: Stores) -> None:
    """Nobody can tell whose siblings come there then: none of them finds anything, nor does the second writer."""
    keys = hashes(1)
    first = stores(storage_config(mla=True, tp=(0, 2)), filled(1))
    assert first.batch_set_v1(keys, rows(0)) == [True]
    second = stores(storage_config(mla=True, tp=(0, 2)), filled(2))
    reader = stores(storage_config(mla=True, tp=(1, 2)), filled(0))
    second.batch_set_v1(keys, rows(0))
    assert [second.batch_exists(keys), reader.batch_exists(keys)] == [0, 0]
    assert reader.batch_get_v1(keys, rows(3)) == second.batch_get_v1(keys, rows(3)) == [False]
    assert set(contents(reader.mem_pool_host, [3])[0]) == {0}
    assert first.batch_exists(keys) == 1


def test_a_writer_whose_siblings_cannot_come_finds_nothing_itself(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang loads what all ranks find; a writer that is alone with its pages must not answer for the others."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    writer, keys = stores(storage_config(mla=True, tp=(0, 2)), mla_pool()), hashes(1)
    assert writer.batch_set_v1(keys, rows(0)) == [False]
    assert writer.batch_exists(keys) == 0
