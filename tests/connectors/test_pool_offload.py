"""A pool in one process writes to SSD what its offload policies admit, when they admit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from umbp_connectors.config import UmbpConfig
from umbp_connectors.hookspecs import ClientSpec
from umbp_connectors.plugins import create_manager
from umbp_connectors.pool.local import LocalPool
from umbp_core.errors import ConfigError
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SIZE = 1000
KEYS = [b"a", b"b", b"c"]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Opens pools as a user's configuration makes them, and closes them."""
    pools: list[LocalPool] = []

    def make(**config: Any) -> LocalPool:
        whole = UmbpConfig(
            dram_capacity=1 << 20, ssd_dir=tmp_path, ssd_capacity=16 << 20, dram_prefault=False, **config
        )
        spec = ClientSpec(Identity("model", bytes(32), RankScope()), object_bytes=SIZE)
        pool = create_manager(whole, entries=[]).make_client(spec)
        assert isinstance(pool, LocalPool)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def on_ssd(pool: LocalPool) -> list[bytes]:
    assert pool.flush(60)
    return sorted(pool.holdings()[Tier.SSD])


def put(pool: LocalPool) -> None:
    pool.put(KEYS, [key * SIZE for key in KEYS])


def get(pool: LocalPool, *keys: bytes) -> None:
    buffers = [bytearray(SIZE) for _ in keys]
    assert all(status.hit for status in pool.get(keys, buffers))
    assert buffers == [key * SIZE for key in keys]


def test_everything_goes_unless_something_is_configured(opened: Any) -> None:
    pool = opened()
    put(pool)
    assert on_ssd(pool) == KEYS
    assert pool.counters().demotions_refused == {}


@pytest.mark.statement("connector", 73)
def test_with_frequency_an_object_goes_when_it_is_read(opened: Any) -> None:
    pool = opened(ssd_offload_policy="presence,frequency")
    put(pool)
    assert on_ssd(pool) == []
    assert pool.counters().demotions_refused == {"frequency": 3}
    get(pool, b"a", b"c")
    assert on_ssd(pool) == [b"a", b"c"]
    loan = pool.lend([b"b"])
    assert loan.objects[0].status.hit
    loan.release()
    assert on_ssd(pool) == KEYS
    get(pool, *KEYS)
    assert pool.counters().demoted == 3
    assert pool.counters().demotions_refused == {"frequency": 3}


def test_it_is_found_after_a_restart(opened: Any) -> None:
    pool = opened(ssd_offload_policy="frequency")
    put(pool)
    get(pool, b"b")
    assert on_ssd(pool) == [b"b"]
    pool.close()
    again = opened(ssd_offload_policy="frequency")
    assert again.exists(KEYS) == [False, True, False]


def test_a_priority_that_nobody_can_know_is_refused(opened: Any) -> None:
    with pytest.raises(ConfigError, match="only vLLM's leader knows a request's priority"):
        opened(ssd_offload_policy="priority")
