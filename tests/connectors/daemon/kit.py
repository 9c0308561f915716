"""Objects, identities and clients for the tests of the daemon."""

from __future__ import annotations

from collections.abc import Sequence

from umbp_connectors.daemon.client import DaemonClientConfig, DaemonPool
from umbp_connectors.daemon.doors import Door
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.ids import Identity, RankScope

SIZE = 16 << 10
PAGES = 64
IDENTITY = Identity("shared", b"\x11" * 32, RankScope(tp_rank=1, tp_size=2))


def key_of(number: int) -> bytes:
    """The key of an object."""
    return b"%032d" % number


def object_of(number: int, size: int = SIZE) -> bytes:
    """Its bytes."""
    return (b"%09d " % number * size)[:size]


def client_of(door: Door, identity: Identity = IDENTITY, pages: int = PAGES, **options: object) -> DaemonPool:
    """A client of the daemon at ``door``, not open yet."""
    settings = {"timeout_s": 30.0, "prefault": False, **options}
    return DaemonPool(identity, DaemonClientConfig(door, SIZE, pages * SIZE, **settings))  # type: ignore[arg-type]


def put(pool: DaemonPool, numbers: Sequence[int], timeout: float | None = None) -> list[PutStatus]:
    """Store some of the objects."""
    return pool.put([key_of(n) for n in numbers], [object_of(n) for n in numbers], list(numbers), timeout)


def get(pool: DaemonPool, numbers: Sequence[int], timeout: float | None = None) -> list[GetStatus]:
    """Read some of them, and compare what are hits byte by byte."""
    buffers = [bytearray(SIZE) for _ in numbers]
    statuses = pool.get([key_of(n) for n in numbers], buffers, timeout)
    for number, buffer, status in zip(numbers, buffers, statuses, strict=True):
        assert not status.hit or buffer == object_of(number), number
    return statuses
