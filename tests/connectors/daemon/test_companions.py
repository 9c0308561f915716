"""The pools of a model's ranks in one daemon: a block of which one rank has lost its part leaves the others too."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import SIZE, get, key_of, object_of, put
from tests.connectors.waiting import until
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.companions import have_parts_of_same_blocks
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.errors import StateError
from umbp_core.ids import Identity, RankScope

Start = Callable[..., Daemon]
Connect = Callable[..., DaemonPool]

IDENTITY = Identity("companions", b"\x22" * 32, RankScope())


def rank_of(rank: int, ranks: int = 2, **scope: int) -> Identity:
    return replace(IDENTITY, rank=RankScope(tp_rank=rank, tp_size=ranks, **scope))


def ranks(connect: Connect, count: int = 2, pages: Sequence[int] = (8, 8, 8)) -> list[DaemonPool]:
    return [connect(rank_of(rank, count), pages=pages[rank], rank=rank, ranks=count) for rank in range(count)]


def there(pool: DaemonPool, numbers: Sequence[int]) -> list[int]:
    found = pool.exists([key_of(number) for number in numbers])
    return [number for number, is_there in zip(numbers, found, strict=True) if is_there]


def test_what_one_rank_evicts_leaves_the_others(start: Start, connect: Connect) -> None:
    start(dram_capacity=30 * SIZE)
    small, *others = ranks(connect, 3, pages=(4, 12, 12))
    for pool in (*others, small):  # the small one evicts when the others have everything
        for number in range(10):
            assert put(pool, [number]) == [PutStatus.STORED]
    left = there(small, range(10))
    assert 0 < len(left) <= 4
    for pool in others:
        until(lambda pool=pool: there(pool, range(10)) == left)
        assert get(pool, left) == [GetStatus.DRAM] * len(left)
    assert there(small, range(10)) == left


def test_what_is_on_ssd_still_stays_with_all(start: Start, connect: Connect, tmp_path: Path) -> None:
    daemon = start(dram_capacity=30 * SIZE, ssd_dir=tmp_path / "ssd", ssd_capacity=64 << 20)
    small, large = ranks(connect, pages=(4, 12))
    for pool in (large, small):
        for number in range(10):
            assert put(pool, [number]) == [PutStatus.STORED]
            assert pool.flush(30)
    assert small.exists([key_of(0)]) == [True], "on SSD"
    # An object that has left for good: when that has been heard, so has everything before.
    kept = daemon.keeper.find(rank_of(0).digest)
    assert kept is not None
    assert put(large, [99]) == put(small, [99]) == [PutStatus.STORED]
    assert kept.pool.evict([key_of(99)]) == 1
    until(lambda: there(large, [99]) == [])
    assert there(large, range(10)) == list(range(10)) == there(small, range(10))
    assert get(large, range(10)) == [GetStatus.DRAM] * 10


def test_what_is_cleared_or_evicted_by_hand_leaves_too(start: Start, connect: Connect) -> None:
    start(dram_capacity=30 * SIZE)
    first, second = ranks(connect)
    for pool in (first, second):
        put(pool, range(6))
    assert first.clear() == 6
    until(lambda: there(second, range(6)) == [])


def test_what_is_stored_again_stays(start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked what is gone when the others are told, not when it went."""
    start(dram_capacity=30 * SIZE)
    first, second = ranks(connect)
    for pool in (first, second):
        put(pool, range(3))
    told: list[bytes] = []
    missing = LocalPool.missing

    def restored(pool: LocalPool, keys: Sequence[bytes]) -> list[bytes]:
        if not told:
            told.extend(keys)
            assert pool.put([key_of(1)], [object_of(1)]) == [PutStatus.STORED]
        return missing(pool, keys)

    monkeypatch.setattr(LocalPool, "missing", restored)
    first.clear()
    until(lambda: there(second, [0, 2]) == [])
    assert there(second, [1]) == [1] == there(first, [1])
    assert get(second, [1]) == [GetStatus.DRAM]


def test_pools_of_other_models_keep_theirs(start: Start, connect: Connect) -> None:
    start(dram_capacity=60 * SIZE)
    first, second = ranks(connect)
    strangers = [
        connect(replace(rank_of(1), namespace="another"), pages=8, rank=1, ranks=2),
        connect(replace(rank_of(1), layout=b"\x33" * 32), pages=8, rank=1, ranks=2),
        connect(rank_of(1, 3), pages=8, rank=1, ranks=3),
    ]
    for pool in (first, second, *strangers):
        put(pool, range(3))
    first.clear()
    until(lambda: there(second, range(3)) == [])
    assert [there(pool, range(3)) for pool in strangers] == [[0, 1, 2]] * 3


def test_a_companion_that_fails_costs_nobody_a_hit(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = start(dram_capacity=30 * SIZE)
    first, second = ranks(connect)
    for pool in (first, second):
        put(pool, range(3))
    errors: list[Exception] = [StateError("closed"), RuntimeError("of ours")]
    evict = LocalPool.evict

    def failing(pool: LocalPool, keys: Sequence[bytes]) -> int:
        if errors:
            raise errors.pop(0)
        return evict(pool, keys)

    monkeypatch.setattr(LocalPool, "evict", failing)
    with caplog.at_level(logging.ERROR):
        first.clear()
        until(lambda: len(errors) == 1)
        assert put(first, [0]) == [PutStatus.STORED]
        first.clear()
        until(lambda: not errors)
        until(lambda: "stays with those of the other ranks" in caplog.text)
    assert there(second, range(3)) == [0, 1, 2]
    assert put(first, [0, 5]) == [PutStatus.STORED] * 2
    assert get(first, [0, 5]) == [GetStatus.DRAM] * 2
    daemon.close()


def test_without_a_thread_the_pools_work_each_by_itself(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "umbp-partings":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    daemon = start(dram_capacity=30 * SIZE)
    for pool in ranks(connect):
        assert put(pool, range(3)) == [PutStatus.STORED] * 3
        assert get(pool, range(3)) == [GetStatus.DRAM] * 3
    assert caplog.text.count("can't start new thread") == 2
    daemon.close()


@pytest.mark.parametrize(
    ("other", "related"),
    [
        (rank_of(1), True),
        (rank_of(0), False),
        (rank_of(1, 4), False),
        (replace(rank_of(1), namespace="another"), False),
        (replace(rank_of(1), layout=b"\x33" * 32), False),
        (rank_of(1, pp_rank=1, pp_size=2), False),
        (replace(IDENTITY, rank=RankScope(heads=(1, 2))), False),
    ],
)
def test_who_has_parts_of_the_same_blocks(other: Identity, related: bool) -> None:
    assert have_parts_of_same_blocks(rank_of(0), other) is related
    assert have_parts_of_same_blocks(other, rank_of(0)) is related


def test_stages_have_layouts_of_their_own() -> None:
    first = rank_of(0, pp_rank=0, pp_size=2)
    last = replace(rank_of(0, pp_rank=1, pp_size=2), layout=b"\x33" * 32)
    assert have_parts_of_same_blocks(first, last)
    assert not have_parts_of_same_blocks(first, replace(last, rank=replace(last.rank, pp_rank=0, tp_rank=1)))


def test_ranges_of_heads_go_together_whichever_rank_has_them() -> None:
    first = replace(IDENTITY, rank=RankScope(tp_rank=0, tp_size=2, heads=(0, 4)))
    last = replace(IDENTITY, rank=RankScope(tp_rank=3, tp_size=4, heads=(3, 4)))
    assert have_parts_of_same_blocks(first, last)
