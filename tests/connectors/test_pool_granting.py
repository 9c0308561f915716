"""Pages of a pool that somebody else writes in place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.connectors.pool_memory import memory_of
from umbp_connectors.pool.checksums import object_checksum
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_core.errors import StateError
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SIZE = 4096
IDENTITY = Identity("granted", b"\x11" * 32, RankScope())
KEYS = [b"key %d" % number for number in range(4)]


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    pool = LocalPool(IDENTITY, LocalPoolConfig(SIZE, 4 * SIZE, prefault=False))
    pool.open()
    yield pool
    pool.close()


def _write(pool: LocalPool, page: int | PutStatus, key: bytes, data: bytes) -> bytes:
    """Put ``data`` into a page as another process would; its checksum."""
    assert isinstance(page, int)
    memory_of(pool)[page, : len(data)] = np.frombuffer(data, np.uint8)
    return object_checksum(IDENTITY.object_key(key), data)


def _used(pool: LocalPool) -> int:
    stats = pool.stats(Tier.DRAM)
    assert stats is not None
    return stats.total_pages - stats.free_pages


def test_what_is_published_can_be_read(pool: LocalPool) -> None:
    grant = pool.grant(KEYS[:2], [SIZE, 100])
    assert grant.pages == 2
    sums = {
        key: _write(pool, page, key, data)
        for key, page, data in zip(KEYS, grant.places, [b"a" * SIZE, b"b" * 100], strict=False)
    }
    assert pool.exists(KEYS[:2]) == [False, False]
    assert pool.put(KEYS[:1], [bytes(SIZE)]) == [PutStatus.PRESENT], "the first writer wins"
    assert grant.publish(sums)
    back = bytearray(SIZE), bytearray(100)
    assert pool.get(KEYS[:2], back) == [GetStatus.DRAM] * 2
    assert back == (b"a" * SIZE, b"b" * 100)
    assert pool.counters().puts == {**dict.fromkeys(PutStatus, 0), PutStatus.STORED: 2, PutStatus.PRESENT: 1}


def test_what_is_not_written_is_given_back(pool: LocalPool) -> None:
    grant = pool.grant(KEYS[:3], [SIZE] * 3)
    assert _used(pool) == 3
    assert grant.publish({KEYS[1]: _write(pool, grant.places[1], KEYS[1], b"b" * SIZE)})
    grant.discard()
    assert pool.exists(KEYS) == [False, True, False, False]
    assert _used(pool) == 1
    again = pool.grant(KEYS, [SIZE, SIZE, SIZE + 1, 0])
    assert again.places[1:] == (PutStatus.PRESENT, PutStatus.TOO_LARGE, PutStatus.TOO_LARGE)
    again.discard()
    assert _used(pool) == 1
    assert not again.publish({KEYS[0]: bytes(16)}), "too late"
    assert pool.exists(KEYS[:1]) == [False]


def test_what_was_not_granted_cannot_be_published(pool: LocalPool) -> None:
    pool.put(KEYS[1:2], [bytes(SIZE)])
    grant = pool.grant(KEYS[:2], [SIZE] * 2)
    for wrong in ({KEYS[1]: bytes(16)}, {KEYS[3]: bytes(16)}, {KEYS[0]: b"short"}):
        with pytest.raises(StateError, match="not granted"):
            grant.publish(wrong)
    assert grant.publish({KEYS[0]: _write(pool, grant.places[0], KEYS[0], b"a" * SIZE)})


def test_a_clear_voids_a_grant(pool: LocalPool) -> None:
    grant = pool.grant(KEYS[:1], [SIZE])
    sums = {KEYS[0]: _write(pool, grant.places[0], KEYS[0], b"a" * SIZE)}
    pool.clear()
    assert not grant.publish(sums)
    assert pool.exists(KEYS[:1]) == [False]
    assert _used(pool) == 0


def test_a_grant_outlives_its_pool(pool: LocalPool) -> None:
    grant = pool.grant(KEYS[:1], [SIZE])
    pool.close()
    assert not grant.publish({KEYS[0]: bytes(16)})


def test_arguments_have_to_match(pool: LocalPool) -> None:
    with pytest.raises(ValueError, match="do not match"):
        pool.grant(KEYS, [SIZE])
