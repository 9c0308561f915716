"""Several pools of one engine, with unequal shares of one SSD folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.pool.capacity import catalogue_allowance
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_connectors.pool.settings import local_pool_config
from umbp_core.errors import ConfigError
from umbp_core.eviction import LruPolicy
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SIZE = 16 << 10
CAPACITY = 24 << 20
SHARES = {"kv": 0.7, "swa": 0.2, "mamba": 0.1}
SMALL = 4096
"""The locks and what says whose folder it is, for each namespace."""


def _pool(
    ssd: Path, name: str, share: float, capacity: int = CAPACITY, rank: int = 0, ranks: int = 1, engines: int = 1
) -> LocalPool:
    config = LocalPoolConfig(
        SIZE,
        8 * SIZE,
        ssd,
        capacity,
        rank=rank,
        ranks=ranks,
        prefault=False,
        patience_s=0,
        ssd_share=share,
        ssd_engines=engines,
    )
    pool = LocalPool(Identity(name, b"\x11" * 32, RankScope(tp_rank=rank, tp_size=ranks)), config)
    pool.open()
    return pool


def _slots(pool: LocalPool) -> int:
    stats = pool.stats(Tier.SSD)
    assert stats is not None
    return stats.total_pages


def _slots_of(nbytes: int) -> int:
    fixed = catalogue_allowance(0, 1)
    return (nbytes - fixed) // (SIZE + catalogue_allowance(1, 1) - fixed)


def _used(ssd: Path) -> int:
    return sum(path.stat().st_size for path in ssd.rglob("*") if path.is_file())


def _fill(pool: LocalPool, count: int) -> None:
    for start in range(0, count, 8):
        keys = [b"%030d" % number for number in range(start, min(start + 8, count))]
        assert set(pool.put(keys, [key * 500 for key in keys])) <= {PutStatus.STORED, PutStatus.PRESENT}
        assert pool.flush(60)


@pytest.mark.parametrize("order", [["kv", "swa", "mamba"], ["mamba", "kv", "swa"]])
def test_every_pool_gets_its_share_in_whatever_order_they_open(tmp_path: Path, order: list[str]) -> None:
    with contextlib.ExitStack() as stack:
        pools = {}
        for name in order:
            pools[name] = _pool(tmp_path, name, SHARES[name])
            stack.callback(pools[name].close)
        for name, pool in pools.items():
            assert _slots(pool) == _slots_of(int(CAPACITY * SHARES[name])), name
            _fill(pool, _slots(pool) + 10)
        assert _used(tmp_path) <= CAPACITY + 3 * SMALL


def test_a_restart_finds_everything_again(tmp_path: Path) -> None:
    for life in range(2):
        with contextlib.ExitStack() as stack:
            for name, share in SHARES.items():
                pool = _pool(tmp_path, name, share)
                stack.callback(pool.close)
                if life:
                    buffer = bytearray(30 * 500)
                    assert pool.get([b"%030d" % 0], [buffer]) == [GetStatus.SSD], name
                    assert buffer == (b"%030d" % 0) * 500
                else:
                    _fill(pool, 4)


def test_ranks_and_engines_divide_a_share_further(tmp_path: Path) -> None:
    capacity = 64 << 20
    with contextlib.ExitStack() as stack:
        for engine in range(2):
            for name, share in SHARES.items():
                for rank in range(2):
                    pool = _pool(tmp_path, f"{name} of {engine}", share, capacity, rank, ranks=2, engines=2)
                    stack.callback(pool.close)
                    assert _slots(pool) == _slots_of(int(capacity * share) // 2 // 2), (engine, name, rank)
                    _fill(pool, 8)
        assert _used(tmp_path) <= capacity + 6 * SMALL


def test_shares_that_change_stay_within_the_capacity(tmp_path: Path) -> None:
    for shares in ((0.9, 0.1), (0.1, 0.9), (0.5, 0.5), (1.0, 0.4)):
        with contextlib.ExitStack() as stack:
            for name, share in zip(("first", "second"), shares, strict=True):
                pool = _pool(tmp_path, name, share)
                stack.callback(pool.close)
                if pool.stats(Tier.SSD) is not None:
                    _fill(pool, 12)
                assert _used(tmp_path) <= CAPACITY + 2 * SMALL, shares


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_is_a_part_of_the_whole(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        _pool(tmp_path, "kv", share)


def test_the_threads_of_a_pool_are_those_that_the_user_asks_for() -> None:
    config = UmbpConfig(copy_threads=5, io_threads=7)
    made = local_pool_config(config, object_bytes=4096, dram_bytes=1 << 20, eviction=LruPolicy)
    assert (made.copy_threads, made.io_threads, made.demote_threads) == (5, 7, 7)
    assert local_pool_config(UmbpConfig(), object_bytes=1, dram_bytes=1, eviction=LruPolicy).copy_threads == 2
