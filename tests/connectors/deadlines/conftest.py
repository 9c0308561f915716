"""A disk that hangs, a clock that stands still, and a pool over both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.connectors.deadlines.kit import COLD, SIZE, WARM, object_of
from tests.connectors.disk import Disk
from umbp_connectors.pool import local
from umbp_connectors.pool.local import LocalPool, LocalPoolConfig, PutStatus
from umbp_core.ids import Identity, RankScope
from umbp_core.testing.fakes import FakeClock


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    with Disk(monkeypatch) as disk:
        yield disk


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make(
    disk: Disk, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., LocalPool]]:
    """Opens a pool with ``COLD`` on SSD only and ``WARM`` in DRAM."""
    made: list[LocalPool] = []
    monkeypatch.setattr(local, "_FORGET_S", 60.0)

    def make(pages: int = 16, **options: object) -> LocalPool:
        for cold in (True, False):
            config = LocalPoolConfig(
                SIZE,
                (16 if cold else pages) * SIZE,
                tmp_path / "ssd",
                (1 << 20) + 40 * (SIZE + 768),
                prefault=False,
                patience_s=0,
                **options,  # type: ignore[arg-type]
            )
            made.append(LocalPool(Identity("model", b"\x11" * 32, RankScope()), config, clock))
            made[-1].open()
            keys = COLD if cold else WARM
            assert made[-1].put(keys, [object_of(key) for key in keys]) == [PutStatus.STORED] * len(keys)
            assert made[-1].flush(30)
            if cold:
                made[-1].close()
        return made[-1]

    yield make
    disk.work()
    for pool in made:
        pool.close()
