"""A shared pool whose other side is killed or stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.connectors.later import pass_time
from tests.connectors.sharing.conftest import pinned
from tests.connectors.sharing.processes import IDENTITY, SIZE, Other, key_of, object_of
from tests.connectors.waiting import until
from umbp_connectors.pool.local import GetStatus, LocalPool
from umbp_connectors.pool.sharing import SharedPoolReader, SharedPoolServer
from umbp_connectors.pool.sharing import reader as readers
from umbp_core.breaker import Backoff

Start = Callable[[str, int], Other]


@pytest.fixture
def start(path: Path) -> Iterator[Start]:
    made: list[Other] = []

    def start(role: str, count: int) -> Other:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        made.append(Other(role, path, count))
        return made[-1]

    yield start
    for other in made:
        other.signal(signal.SIGCONT)
        other.end()


def _get(reader: SharedPoolReader, count: int, timeout: float | None = None) -> list[GetStatus]:
    buffers = [bytearray(SIZE) for _ in range(count)]
    statuses = reader.get([key_of(number) for number in range(count)], buffers, timeout)
    for number, (buffer, status) in enumerate(zip(buffers, statuses, strict=True)):
        assert not status.hit or buffer == object_of(number)
    return statuses


def test_a_reader_of_another_process_gets_the_bytes(start: Start, reader: SharedPoolReader) -> None:
    start("serve", 20)
    assert reader.count_prefix([key_of(number) for number in range(30)]) == 20
    assert _get(reader, 22) == [GetStatus.DRAM] * 20 + [GetStatus.MISS] * 2


def test_a_server_that_is_killed_costs_misses_until_there_is_another(start: Start, reader: SharedPoolReader) -> None:
    server = start("serve", 3)
    assert _get(reader, 3) == [GetStatus.DRAM] * 3
    server.signal(signal.SIGKILL)
    server.end()
    began = time.monotonic()
    assert _get(reader, 3) == [GetStatus.MISS] * 3
    assert reader.exists([key_of(0)]) == [False]
    assert time.monotonic() - began < 25, "a dead server is noticed at once, not by a timeout of 30 seconds"
    start("serve", 3)  # takes over the socket that the dead one left
    until(lambda: _get(reader, 3) == [GetStatus.DRAM] * 3)


def test_a_server_that_hangs_costs_the_time_of_a_few_calls(
    start: Start, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "Backoff", lambda: Backoff(120.0, 120.0))
    server = start("serve", 3)
    reader = SharedPoolReader(path, IDENTITY, timeout_s=0.1, failures=2)
    assert _get(reader, 3, timeout=30) == [GetStatus.DRAM] * 3
    server.stop()
    # A call that has no time left when it begins asks nobody.
    until(lambda: _get(reader, 3) == [GetStatus.TIMED_OUT] * 3 and reader.failed == 1)
    until(lambda: reader.exists([key_of(0)]) == [False] and reader.failed == 2)
    assert _get(reader, 3, timeout=30) == [GetStatus.MISS] * 3, "it is not asked any more"
    server.signal(signal.SIGCONT)
    pass_time(monkeypatch, 120.0, readers)
    until(lambda: _get(reader, 3, timeout=30) == [GetStatus.DRAM] * 3)
    reader.close()


def test_a_reader_that_is_killed_gives_back_what_it_was_lent(
    start: Start, share: Callable[..., tuple[LocalPool, SharedPoolServer]]
) -> None:
    pool, server = share(8)
    other = start("borrow", 4)
    assert (pinned(pool), server.readers) == (4, 1)
    other.signal(signal.SIGKILL)
    other.end()
    until(lambda: pinned(pool) == 0)
    until(lambda: server.readers == 0)


def test_a_reader_that_is_stopped_keeps_its_loan_for_the_lease_only(
    start: Start, share: Callable[..., tuple[LocalPool, SharedPoolServer]]
) -> None:
    pool, server = share(8, lease_s=0.5)
    other = start("borrow", 4)
    other.stop()
    until(lambda: pinned(pool) == 0)
    assert server.readers == 1


def test_a_server_closes_though_a_reader_is_stopped(
    start: Start, share: Callable[..., tuple[LocalPool, SharedPoolServer]]
) -> None:
    pool, server = share(8)
    other = start("borrow", 4)
    other.stop()
    server.close(60)
    assert (pinned(pool), server.readers) == (0, 0)
