"""A pool in a daemon through its doors: what a client gets, and what it may not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import IDENTITY, PAGES, SIZE, client_of, get, key_of, object_of, put
from tests.connectors.waiting import until
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.client import DaemonClientConfig, DaemonPool
from umbp_connectors.daemon.link import Link
from umbp_connectors.daemon.settings import socket_path
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_connectors.pool.rows import ObjectRows
from umbp_connectors.pool.shares import CopyShares
from umbp_core.errors import ConfigError, StateError, TierUnavailable
from umbp_core.ids import RankScope
from umbp_core.tiers import Tier

Start = Callable[..., Daemon]
Connect = Callable[..., DaemonPool]


def test_put_get_and_exists(start: Start, connect: Connect) -> None:
    daemon, pool = start(), connect()
    assert put(pool, range(8)) == [PutStatus.STORED] * 8
    assert put(pool, [7, 8]) == [PutStatus.PRESENT, PutStatus.STORED]
    keys = [key_of(number) for number in range(12)]
    assert pool.exists(keys) == [True] * 9 + [False] * 3
    assert pool.count_prefix(keys) == 9
    assert pool.count_prefix(keys[9:]) == pool.count_prefix([]) == 0
    assert get(pool, range(10)) == [GetStatus.DRAM] * 9 + [GetStatus.MISS]
    assert pool.get([], []) == pool.put([], []) == pool.exists([]) == []
    until(lambda: daemon.pinned() == 0)
    counters = pool.counters()
    assert (counters.puts[PutStatus.STORED], counters.puts[PutStatus.PRESENT]) == (9, 1)
    assert (counters.gets[GetStatus.DRAM], counters.gets[GetStatus.MISS]) == (9, 1)
    stats = pool.stats(Tier.DRAM)
    assert stats is not None
    assert (stats.total_pages, stats.objects, stats.pinned) == (PAGES, 9, 0)
    assert pool.stats(Tier.SSD) is None
    assert pool.flush(30)
    assert pool.clear() == 9
    assert get(pool, [0]) == [GetStatus.MISS]
    assert pool.failed == 0


def test_the_first_writer_wins(start: Start, connect: Connect) -> None:
    start()
    one, two = connect(), connect()
    assert put(one, [1]) == [PutStatus.STORED]
    assert two.put([key_of(1)], [bytes(SIZE)]) == [PutStatus.PRESENT]
    assert get(two, [1]) == [GetStatus.DRAM]


def test_more_objects_than_the_pool_holds(start: Start, connect: Connect) -> None:
    start()
    pool = connect()
    assert put(pool, range(3 * PAGES)) == [PutStatus.STORED] * 3 * PAGES
    found = get(pool, range(3 * PAGES))
    assert found.count(GetStatus.DRAM) == PAGES
    assert set(found) == {GetStatus.DRAM, GetStatus.MISS}


def test_a_batch_that_is_larger_than_the_part_of_its_client_waits_for_itself(start: Start, connect: Connect) -> None:
    """What it asks for ahead is refused while the part before takes all that the client may hold."""
    start()
    pool, reader, *_ = [connect() for _ in range(4)]  # eight pages each, and as many objects are asked for at a time
    assert put(pool, range(40)) == [PutStatus.STORED] * 40
    assert get(reader, range(40)) == [GetStatus.DRAM] * 40
    staged = pool.stage([key_of(number) for number in range(50, 66)], [object_of(number) for number in range(50, 66)])
    assert staged.statuses == [PutStatus.STORED] * 8 + [PutStatus.NO_ROOM] * 8, "nothing of it is given back"
    staged.discard()


def test_sizes_keys_and_arguments(start: Start, connect: Connect) -> None:
    start()
    pool = connect()
    assert pool.put([b"a", b"b", b"c"], [b"", bytes(SIZE + 1), b"short"]) == [
        PutStatus.TOO_LARGE,
        PutStatus.TOO_LARGE,
        PutStatus.STORED,
    ]
    back = bytearray(5)
    assert pool.get([b"c", b"c"], [back, bytearray(6)]) == [GetStatus.DRAM, GetStatus.SIZE_MISMATCH]
    assert back == b"short"
    for wrong in (b"", b"k" * 257):
        with pytest.raises(ValueError, match="1 to 256"):
            pool.exists([wrong])
    with pytest.raises(ValueError, match="can be written"):
        pool.get([b"c"], [bytes(5)])
    with pytest.raises(ValueError, match="do not match"):
        pool.put([b"a"], [])
    assert pool.put([b"negative"], [b"depth"], [-1]) == [PutStatus.STORED]
    assert pool.failed == 0


def test_scattered_objects_and_rows(start: Start, connect: Connect) -> None:
    start()
    pool = connect()
    random = np.random.default_rng(1)
    whole = random.integers(0, 256, (32, 2, SIZE // 4), dtype=np.uint8)
    keys = [key_of(number) for number in range(32)]
    assert pool.put(keys, ObjectRows(whole, range(32))) == [PutStatus.STORED] * 32
    back = np.zeros_like(whole)
    assert pool.get(keys, ObjectRows(back, range(32))) == [GetStatus.DRAM] * 32
    assert np.array_equal(back, whole)
    apart = np.zeros((2, SIZE // 2), dtype=np.uint8)
    assert pool.get(keys[:1], [apart[:, : SIZE // 4]]) == [GetStatus.DRAM]
    assert np.array_equal(apart[:, : SIZE // 4], whole[0])
    assert not apart[:, SIZE // 4 :].any()


def test_large_objects_are_copied_by_several_threads(start: Start, path: Path) -> None:
    start(dram_capacity=64 << 20)
    size = 1 << 20
    pool = DaemonPool(IDENTITY, DaemonClientConfig(path, size, 32 * size, timeout_s=30, copy_threads=3))
    pool.open()
    data = np.random.default_rng(2).integers(0, 256, (16, size), dtype=np.uint8)
    keys = [key_of(number) for number in range(16)]
    assert pool.put(keys, list(data)) == [PutStatus.STORED] * 16
    back = np.zeros_like(data)
    assert pool.get(keys, list(back)) == [GetStatus.DRAM] * 16
    assert np.array_equal(data, back)
    assert pool.wait_prefaulted(30)
    pool.close()


def test_what_is_staged_cannot_be_read(start: Start, connect: Connect) -> None:
    daemon, pool, other = start(), connect(), connect()
    staged = pool.stage([key_of(1), key_of(2)], [object_of(1), object_of(2)])
    assert staged.statuses == [PutStatus.STORED] * 2
    assert other.exists([key_of(1)]) == [False]
    assert put(other, [1]) == [PutStatus.PRESENT]
    assert staged.publish()
    staged.discard()
    assert get(other, [1, 2]) == [GetStatus.DRAM] * 2
    with pool.stage([key_of(3)], [object_of(3)]) as given_up:
        assert given_up.statuses == [PutStatus.STORED]
    assert not given_up.publish()
    until(lambda: daemon.pinned() == 0)
    assert put(other, [3]) == [PutStatus.STORED]
    assert pool.stage([key_of(1)], [object_of(1)]).publish(), "nothing had to be published"


def test_a_clear_voids_what_is_staged(start: Start, connect: Connect) -> None:
    daemon, pool, other = start(), connect(), connect()
    staged = pool.stage([key_of(1)], [object_of(1)])
    other.clear()
    assert not staged.publish()
    assert pool.exists([key_of(1)]) == [False]
    until(lambda: daemon.pinned() == 0)


def test_bytes_that_changed_are_a_miss_and_are_forgotten(start: Start, connect: Connect) -> None:
    daemon, pool = start(), connect()
    put(pool, range(3))
    (kept,) = daemon.keeper.pools()
    kept.pool._opened().arena.array[1, 7] ^= 1
    statuses = get(pool, range(3))
    assert sorted(status.value for status in statuses) == ["corrupt", "dram", "dram"]
    bad = statuses.index(GetStatus.CORRUPT)
    assert get(pool, [bad]) == [GetStatus.MISS]
    assert put(pool, [bad]) == [PutStatus.STORED]
    assert get(pool, range(3)) == [GetStatus.DRAM] * 3


def test_bytes_that_changed_in_dram_come_from_ssd(start: Start, connect: Connect, tmp_path: Path) -> None:
    daemon = start(ssd_dir=tmp_path / "ssd", ssd_capacity=8 << 20)
    pool = connect()
    put(pool, range(3))
    assert pool.flush(30)
    (kept,) = daemon.keeper.pools()
    kept.pool._opened().arena.array[:3, 7] ^= 1
    assert get(pool, range(3)) == [GetStatus.SSD] * 3


def test_what_is_on_ssd_comes_back(start: Start, connect: Connect, tmp_path: Path) -> None:
    start(ssd_dir=tmp_path / "ssd", ssd_capacity=16 << 20)
    pool = connect()
    for first in range(0, 2 * PAGES, 16):
        put(pool, range(first, first + 16))
        assert pool.flush(30)
    found = get(pool, range(2 * PAGES))
    assert GetStatus.SSD in found
    assert all(status.hit for status in found)
    assert get(pool, [2 * PAGES - 1]) == [GetStatus.DRAM]
    ssd = pool.stats(Tier.SSD)
    assert ssd is not None
    assert ssd.objects == 2 * PAGES
    assert pool.counters().demoted >= 2 * PAGES


def test_identities_are_apart(start: Start, connect: Connect) -> None:
    daemon = start()
    pools = [
        connect(IDENTITY),
        connect(replace(IDENTITY, namespace="another")),
        connect(replace(IDENTITY, layout=b"\x22" * 32)),
        connect(replace(IDENTITY, rank=RankScope(heads=(1, 2)))),
    ]
    for number, pool in enumerate(pools):
        assert pool.exists([key_of(0)]) == [False]
        assert pool.put([key_of(0)], [object_of(number)]) == [PutStatus.STORED]
    for number, pool in enumerate(pools):
        back = bytearray(SIZE)
        assert pool.get([key_of(0)], [back]) == [GetStatus.DRAM]
        assert back == object_of(number)
    assert len({kept.pool.identity.digest for kept in daemon.keeper.pools()}) == 4
    pools[0].clear()
    assert [pool.exists([key_of(0)]) for pool in pools] == [[False], [True], [True], [True]]


def test_a_pool_outlives_its_clients(start: Start, connect: Connect) -> None:
    daemon, pool = start(), connect()
    put(pool, range(5))
    pool.close()
    pool.close()
    with pytest.raises(StateError, match="not open"):
        pool.exists([key_of(0)])
    until(lambda: daemon.server.connections == 0)
    assert get(connect(), range(5)) == [GetStatus.DRAM] * 5


def test_no_time_at_all(start: Start, connect: Connect) -> None:
    start()
    pool = connect()
    put(pool, [0])
    assert put(pool, [1, 2], timeout=0) == [PutStatus.TIMED_OUT] * 2
    assert get(pool, [0, 1], timeout=0) == [GetStatus.TIMED_OUT] * 2
    assert pool.exists([key_of(0)], timeout=0) == [False]
    assert pool.count_prefix([key_of(0)], timeout=0) == 0
    assert get(pool, [0, 1]) == [GetStatus.DRAM, GetStatus.MISS]
    assert pool.failed == 0


def test_without_a_daemon_everything_is_a_miss(
    connect: Connect, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    pool = connect()
    assert put(pool, [1]) == [PutStatus.NO_ROOM]
    assert get(pool, [1]) == [GetStatus.MISS]
    assert pool.exists([key_of(1)]) == [False]
    assert pool.count_prefix([key_of(1)]) == 0
    with pytest.raises(TierUnavailable, match="clear again when it answers"):
        pool.clear()
    assert not pool.flush(0.1)
    assert pool.stats(Tier.DRAM) is None
    assert not pool.stage([key_of(1)], [object_of(1)]).publish()
    assert sum("does not answer" in record.message for record in caplog.records) == 1
    start()
    until(lambda: put(pool, [1])[0] in (PutStatus.STORED, PutStatus.PRESENT))
    assert get(pool, [1]) == [GetStatus.DRAM]


def test_a_daemon_that_comes_back_is_used_again(start: Start, connect: Connect, tmp_path: Path) -> None:
    first = start(ssd_dir=tmp_path / "ssd", ssd_capacity=8 << 20)
    pool = connect()
    put(pool, range(20))
    staged = pool.stage([key_of(50)], [object_of(50)])
    first.close()
    assert get(pool, range(20)) == [GetStatus.MISS] * 20
    start(ssd_dir=tmp_path / "ssd", ssd_capacity=8 << 20)
    until(lambda: pool.count_prefix([key_of(number) for number in range(20)]) == 20)
    until(lambda: get(pool, range(20)) == [GetStatus.SSD] * 20)
    assert get(pool, range(20)) == [GetStatus.DRAM] * 20
    assert not staged.publish(), "it was granted by a daemon that is gone"
    assert pool.exists([key_of(50)]) == [False]


def test_threads_use_one_client(start: Start, connect: Connect) -> None:
    daemon, pool = start(), connect()

    def work(part: int) -> None:
        for _ in range(5):
            numbers = range(part, 24, 4)
            put(pool, numbers)
            assert all(status.hit for status in get(pool, numbers))
            assert all(pool.exists([key_of(number) for number in numbers]))

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, part) for part in range(4)]:
            done.result(60)
    until(lambda: daemon.pinned() == 0)


def test_a_path_that_is_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match="shorter daemon_socket"):
        socket_path(UmbpConfig(daemon_socket=Path("/" + "long" * 40)))
    assert socket_path(UmbpConfig()).name == "daemon.sock"


def test_open_twice(path: Path) -> None:
    pool = client_of(path)
    with pytest.raises(StateError, match="not open"):
        pool.put([], [])
    pool.open()
    with pytest.raises(StateError, match="already open"):
        pool.open()
    pool.close()


def test_what_nobody_copied_is_neither_stored_nor_a_hit(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    pool = connect()
    with monkeypatch.context() as patch:
        patch.setattr(CopyShares, "run", lambda *arguments: None)
        assert put(pool, range(8)) == [PutStatus.TIMED_OUT] * 8
    assert get(pool, range(8)) == [GetStatus.MISS] * 8
    assert put(pool, range(8)) == [PutStatus.STORED] * 8
    monkeypatch.setattr(CopyShares, "run", lambda *arguments: None)
    found = pool.get([key_of(number) for number in range(8)], [bytearray(SIZE) for _ in range(8)])
    assert found == [GetStatus.TIMED_OUT] * 8


@pytest.mark.parametrize(("count", "grants"), [(16, [16]), (63, [63]), (64, [8, 56]), (150, [50] * 3)])
@pytest.mark.parametrize("full", [False, True])
def test_a_large_put_begins_with_a_few_pages(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, count: int, grants: list[int], full: bool
) -> None:
    start(dram_capacity=512 * SIZE)
    pool = connect(pages=512)
    if full:
        for first in range(1000, 1600, 100):
            assert put(pool, range(first, first + 100)) == [PutStatus.STORED] * 100
    asked: list[int] = []
    ask_pages = Link.ask_pages

    def ask(link: Link, keys: Sequence[bytes], *others: Any) -> int:
        asked.append(len(keys))
        return ask_pages(link, keys, *others)

    monkeypatch.setattr(Link, "ask_pages", ask)
    rows = np.random.default_rng(count).integers(0, 256, (count, SIZE), dtype=np.uint8)
    keys = [key_of(number) for number in range(count)]
    assert pool.put(keys, ObjectRows(rows, range(count))) == [PutStatus.STORED] * count
    assert asked == grants
    found = np.zeros_like(rows)
    assert pool.get(keys, ObjectRows(found, range(count))) == [GetStatus.DRAM] * count
    assert np.array_equal(found, rows)
