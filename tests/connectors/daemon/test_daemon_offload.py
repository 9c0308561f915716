"""A daemon's own configuration says what of its pools goes to SSD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import get, key_of, put
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.pool.outcomes import GetStatus
from umbp_core.tiers import Tier


def test_with_frequency_an_object_goes_to_ssd_when_a_client_reads_it(
    start: Callable[..., Daemon], connect: Callable[..., DaemonPool], tmp_path: Path
) -> None:
    tiers = {"ssd_dir": tmp_path / "ssd", "ssd_capacity": 16 << 20}
    daemon = start(ssd_offload_policy="presence,frequency", **tiers)
    pool = connect()
    put(pool, range(3))
    (kept,) = daemon.keeper.pools()
    assert kept.pool.flush(30)
    assert kept.pool.holdings()[Tier.SSD] == []
    assert get(pool, [1]) == [GetStatus.DRAM]
    assert kept.pool.flush(30)
    assert kept.pool.holdings()[Tier.SSD] == [key_of(1)]
    assert kept.pool.counters().demotions_refused == {"frequency": 3}
