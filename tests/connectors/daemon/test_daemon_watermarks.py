"""The daemon's watermarks count for its pools, whatever its clients are configured to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.engine import Engine, soon
from tests.connectors.daemon.kit import IDENTITY, PAGES, SIZE, get, object_of, put
from tests.connectors.daemon.told import Told, truth
from tests.connectors.waiting import until
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.follower import PoolFollower
from umbp_connectors.daemon.metrics import render
from umbp_connectors.daemon.overview import overview_of
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.tiers import Tier

Start = Callable[..., Daemon]


def test_room_is_kept_and_everybody_is_told(
    start: Start, connect: Callable[..., DaemonPool], path: Path, tmp_path: Path, closing: contextlib.ExitStack
) -> None:
    marks = {"dram_high_watermark": 0.5, "dram_low_watermark": 0.25}
    daemon, pool, told = start(**marks, ssd_dir=tmp_path / "ssd", ssd_capacity=16 << 20), connect(), Told()
    follower = PoolFollower(path, IDENTITY.digest, told)
    closing.callback(follower.close)
    follower.open()
    assert put(pool, range(PAGES)) == [PutStatus.STORED] * PAGES
    until(lambda: len(truth(daemon)[Tier.DRAM]) <= PAGES // 2)
    assert set(get(pool, range(PAGES))) <= {GetStatus.DRAM, GetStatus.SSD}, "nothing is lost"
    assert pool.flush(30)
    until(lambda: len(truth(daemon)[Tier.DRAM]) <= PAGES // 2 and told.held == truth(daemon))
    trimmed = pool.counters().trimmed[Tier.DRAM]
    assert trimmed >= PAGES // 2
    labels = f'namespace="shared",pool="{IDENTITY.digest.hex()[:12]}",tier="dram"'
    assert f"umbp_daemon_trimmed_total{{{labels}}}" in render(overview_of(daemon.keeper), 1).decode()


def test_pages_that_an_engine_has_in_stock_or_reads_stay_its_own(
    start: Start, path: Path, closing: contextlib.ExitStack, connect: Callable[..., DaemonPool]
) -> None:
    daemon = start(dram_high_watermark=0.2, dram_low_watermark=0.01)
    mine = Engine(path)
    closing.callback(mine.close)
    mine.open()
    pages = mine.take(12)
    assert mine.store(pages[:4], {number: object_of(number, SIZE) for number in range(4)}) == [PutStatus.STORED] * 4
    loan, _ = mine.leader.borrow([b"%032d" % number for number in range(4)], soon())
    put(connect(), range(100, 120))
    until(lambda: len(truth(daemon)[Tier.DRAM]) == 4)
    assert daemon.pinned() == 12
    mine.leader.give_back(loan, soon())
    until(lambda: len(truth(daemon)[Tier.DRAM]) == 0)
    assert mine.store(pages[4:], {number: object_of(number, SIZE) for number in range(8)}) == [PutStatus.STORED] * 8
