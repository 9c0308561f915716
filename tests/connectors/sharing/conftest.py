"""Pools that are shared for the time of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.connectors.sharing.processes import IDENTITY, open_pool
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.sharing import SharedPoolReader, SharedPoolServer
from umbp_core.tiers import Tier


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the pool is shared."""
    return tmp_path / "run" / "pool.sock"


@pytest.fixture
def share(path: Path) -> Iterator[Callable[..., tuple[LocalPool, SharedPoolServer]]]:
    """Opens a pool with some objects, and shares it."""
    made: list[tuple[LocalPool, SharedPoolServer]] = []

    def share(
        count: int = 8, lease_s: float = 60.0, max_readers: int = 4, **options: object
    ) -> tuple[LocalPool, SharedPoolServer]:
        pool = open_pool(count, **options)  # type: ignore[arg-type]
        made.append((pool, SharedPoolServer(pool, path, max_readers=max_readers, lease_s=lease_s)))
        made[-1][1].open()
        return made[-1]

    yield share
    for pool, server in made:
        server.close()
        pool.close()


@pytest.fixture
def reader(path: Path) -> Iterator[SharedPoolReader]:
    """A reader of what is shared there."""
    reader = SharedPoolReader(path, IDENTITY, timeout_s=30.0)
    yield reader
    reader.close()


def pinned(pool: LocalPool) -> int:
    """How many objects in DRAM are pinned."""
    stats = pool.stats(Tier.DRAM)
    assert stats is not None
    return stats.pinned
