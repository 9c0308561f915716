"""A pool with watermarks keeps room in its tiers, and gives up nothing for it that an eviction would not (L2, L8)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.connectors.disk import Disk
from tests.connectors.gate import Gate
from tests.connectors.pool_follower import Follower
from tests.connectors.waiting import until
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.pool.books import Contents, Filled
from umbp_connectors.pool.checksums import object_checksum
from umbp_connectors.pool.demoter import Demoter
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_connectors.pool.settings import local_pool_config
from umbp_connectors.pool.trimming import RoomKeeper
from umbp_core.directory import Change, EventKind
from umbp_core.eviction import LruPolicy
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier
from umbp_core.watermarks import Watermarks

SIZE = 4096
HALF = Watermarks(0.5, 0.25)

Make = Callable[..., LocalPool]


class Strict(Follower):
    """Sees too how many objects leave a tier in one go."""

    most = 0

    def changed(self, changes: Sequence[Change], contents: Contents) -> None:
        super().changed(changes, contents)
        self.most = max([self.most, *(len(each.keys) for each in changes if each.kind is EventKind.REMOVED)])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[tuple[LocalPool, Strict]] = []

    def make(pages: int, slots: int = 0, **options: object) -> LocalPool:
        ssd = {"ssd_dir": tmp_path / "ssd", "ssd_capacity": (1 << 20) + slots * (SIZE + 768)} if slots else {}
        config = LocalPoolConfig(SIZE, pages * SIZE, prefault=False, patience_s=0, **ssd, **options)  # type: ignore[arg-type]
        pool, follower = LocalPool(Identity("model", b"\x11" * 32, RankScope()), config), Strict()
        pool.observe(follower)
        pool.open()
        made.append((pool, follower))
        return pool

    yield make
    for pool, follower in made:
        pool.close()
        assert follower.faults == []
        assert follower.most <= 18, "blocks of three parts included"


def keys(count: int, first: int = 0) -> list[bytes]:
    return [b"key %d" % number for number in range(first, first + count)]


def put(pool: LocalPool, names: list[bytes]) -> None:
    for name in names:
        assert pool.put([name], [name.ljust(SIZE)]) == [PutStatus.STORED]


def read(pool: LocalPool, names: list[bytes]) -> list[GetStatus]:
    buffers = [bytearray(SIZE) for _ in names]
    statuses = pool.get(names, buffers)
    assert all(
        buffer == name.ljust(SIZE) for name, buffer, found in zip(names, buffers, statuses, strict=True) if found.hit
    )
    return statuses


def used(pool: LocalPool, tier: Tier) -> int:
    stats = pool.stats(tier)
    assert stats is not None
    return stats.total_pages - stats.free_pages


def store_staged(pool: LocalPool, names: list[bytes]) -> None:
    assert pool.stage(names, [name.ljust(SIZE) for name in names]).publish()


def store_granted(pool: LocalPool, names: list[bytes]) -> None:
    grant = pool.grant(names, [SIZE] * len(names), [0] * len(names))
    assert grant.publish({name: object_checksum(pool.identity.object_key(name), name.ljust(SIZE)) for name in names})


def store_from_stock(pool: LocalPool, names: list[bytes]) -> None:
    stock = pool.stock()
    pairs = zip(stock.take(len(names)), names, strict=True)
    sums = {name: object_checksum(pool.identity.object_key(name), name.ljust(SIZE)) for name in names}
    filled = [Filled(page, name, SIZE, 0, sums[name]) for page, name in pairs]
    assert stock.publish(filled) == [PutStatus.STORED] * len(names)


STORES = {
    "put": lambda pool, names: pool.put(names, [name.ljust(SIZE) for name in names]),
    "stage": store_staged,
    "grant": store_granted,
    "stock": store_from_stock,
}


def test_after_a_burst_the_oldest_leave_a_few_at_a_time(make: Make) -> None:
    pool = make(400, watermarks={Tier.DRAM: HALF})
    names = keys(400)
    burst = pool.stage(names, [name.ljust(SIZE) for name in names])
    assert burst.publish()
    until(lambda: used(pool, Tier.DRAM) == 100)
    assert pool.exists(names) == [False] * 300 + [True] * 100
    assert pool.counters().trimmed == {Tier.DRAM: 300}
    put(pool, keys(100, 400))
    assert read(pool, keys(200, 300)) == [GetStatus.DRAM] * 200, "up to the high watermark nothing goes"


def test_what_leaves_dram_is_on_ssd(make: Make) -> None:
    pool = make(40, 100, watermarks={Tier.DRAM: HALF})
    put(pool, keys(40))
    until(lambda: used(pool, Tier.DRAM) <= 20)
    assert pool.flush(30)
    counters = pool.counters()
    assert (pool.count_prefix(keys(40)), counters.demoted, counters.demotions_dropped) == (40, 40, 0)
    assert GetStatus.SSD in read(pool, keys(40))
    until(lambda: used(pool, Tier.DRAM) <= 20)
    assert pool.count_prefix(keys(40)) == 40


def test_what_waits_for_the_disk_stays_in_dram(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    pool = make(40, 100, demote_threads=1, watermarks={Tier.DRAM: HALF})
    disk.hang("write")
    try:
        put(pool, keys(40))
        disk.wait_held(1)
        assert not threading.Event().wait(0.3)
        assert pool.counters().trimmed == {Tier.DRAM: 0}
    finally:
        disk.work()
    until(lambda: used(pool, Tier.DRAM) <= 20)
    assert pool.count_prefix(keys(40)) == 40


@pytest.mark.parametrize("publish", ["put", "stage", "grant", "stock"])
def test_what_was_just_stored_goes_to_ssd_first(make: Make, monkeypatch: pytest.MonkeyPatch, publish: str) -> None:
    add = Demoter.add
    gate = Gate(add)
    monkeypatch.setattr(Demoter, "add", lambda *arguments: gate(*arguments))
    pool = make(40, 100, watermarks={Tier.DRAM: Watermarks(0.25, 0.125)})
    storing = threading.Thread(target=STORES[publish], args=(pool, keys(40)))
    storing.start()
    gate.wait_until_held()
    assert not threading.Event().wait(0.3)
    assert pool.counters().trimmed == {Tier.DRAM: 0}
    gate.open()
    storing.join(60)
    until(lambda: used(pool, Tier.DRAM) <= 10)
    assert pool.flush(30)
    assert pool.count_prefix(keys(40)) == pool.counters().demoted == 40


def test_what_the_disk_refuses_makes_room_all_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    pool = make(40, 100, watermarks={Tier.DRAM: HALF})
    disk.fail("write")
    put(pool, keys(40))
    until(lambda: used(pool, Tier.DRAM) <= 20)
    assert pool.counters().demoted == 0


def test_an_ssd_that_may_not_be_full_and_its_catalogue(make: Make) -> None:
    pool = make(100, 40, watermarks={Tier.SSD: HALF})
    put(pool, keys(60))
    assert pool.flush(30)
    until(lambda: used(pool, Tier.SSD) <= 20)
    assert used(pool, Tier.DRAM) == 60
    kept = pool.holdings()[Tier.SSD]
    pool.close()
    again = make(100, 40, watermarks={Tier.SSD: HALF})
    assert again.holdings()[Tier.SSD] == kept
    assert again.counters().restored == len(kept)
    assert read(again, kept) == [GetStatus.SSD] * len(kept)


def test_what_an_earlier_life_left_counts_from_the_start(make: Make) -> None:
    pool = make(100, 40, demote_threads=1)
    put(pool, keys(40))
    assert pool.flush(30)
    assert used(pool, Tier.SSD) == 40
    pool.close()
    again = make(100, 40, watermarks={Tier.SSD: HALF})
    until(lambda: used(again, Tier.SSD) <= 10)
    assert again.holdings()[Tier.SSD] == keys(used(again, Tier.SSD), 40 - used(again, Tier.SSD))


def test_what_is_lent_or_being_written_stays(make: Make) -> None:
    pool = make(40, watermarks={Tier.DRAM: HALF})
    put(pool, keys(15))
    loan = pool.lend(keys(15))
    staged = pool.stage(keys(10, 100), [bytes(SIZE)] * 10)
    put(pool, keys(15, 50))
    until(lambda: not any(pool.exists(keys(15, 50))))
    assert (pool.exists(keys(15)), used(pool, Tier.DRAM)) == ([True] * 15, 25)
    loan.release()
    assert staged.publish()
    until(lambda: used(pool, Tier.DRAM) <= 20)
    assert pool.exists(keys(10, 100)) == [True] * 10


def test_the_parts_of_a_block_leave_together(make: Make) -> None:
    pool = make(40, watermarks={Tier.DRAM: Watermarks(0.5, 0.3)})
    blocks = [[b"%064x" % number + part for part in (b"_k", b"_v", b"_r1")] for number in range(13)]
    for parts in blocks:
        pool.put(parts, [bytes(SIZE)] * 3)
    until(lambda: used(pool, Tier.DRAM) <= 20)
    assert {sum(pool.exists(parts)) for parts in blocks} == {0, 3}


def test_without_watermarks_there_is_no_thread_and_nothing_goes(make: Make) -> None:
    assert UmbpConfig().dram_high_watermark is UmbpConfig().ssd_high_watermark is None
    pool = make(40, 60)
    put(pool, keys(40))
    assert pool.flush(30)
    assert (used(pool, Tier.DRAM), used(pool, Tier.SSD), pool.counters().trimmed) == (40, 40, {})
    assert "umbp-trim" not in [thread.name for thread in threading.enumerate()]


def test_the_thread_ends_with_the_pool(make: Make) -> None:
    pool = make(40, watermarks={Tier.DRAM: HALF, Tier.SSD: HALF})
    assert pool.counters().trimmed == {Tier.DRAM: 0}
    assert "umbp-trim" in [thread.name for thread in threading.enumerate()]
    pool.close()
    assert "umbp-trim" not in [thread.name for thread in threading.enumerate()]


def test_a_policy_that_raises_ends_the_keeping_of_room_only(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(LruPolicy):
        def victims(self) -> Iterator[bytes]:
            raise RuntimeError("no idea")

    pool = make(40, eviction=Broken, watermarks={Tier.DRAM: HALF})
    put(pool, keys(40))
    until(lambda: "no room is kept" in caplog.text)
    assert read(pool, keys(40)) == [GetStatus.DRAM] * 40


def test_the_configuration_says_how_full() -> None:
    def marks(**values: float) -> object:
        made = local_pool_config(UmbpConfig(**values), object_bytes=1, dram_bytes=1, eviction=LruPolicy)
        return made.watermarks

    assert marks() == marks(dram_high_watermark=1.0, dram_low_watermark=0.5) == {}
    assert marks(dram_high_watermark=0.9, ssd_high_watermark=0.8, ssd_low_watermark=0.6) == {
        Tier.DRAM: Watermarks(0.9, 0.9),
        Tier.SSD: Watermarks(0.8, 0.6),
    }


def test_a_pool_whose_thread_cannot_start_leaves_its_folder_to_the_next(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(keeper: RoomKeeper) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(RoomKeeper, "start", refuse)
        with pytest.raises(RuntimeError):
            make(8, slots=8, watermarks={Tier.DRAM: HALF})
    pool = make(8, slots=8, watermarks={Tier.DRAM: HALF})
    put(pool, keys(2))
    assert pool.stats(Tier.SSD) is not None, "the folder was free again"
