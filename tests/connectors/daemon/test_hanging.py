"""A daemon that hangs and goes on: every call of a client ends in time, and what was under way is judged rightly."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.daemon.engine import Engine, soon, wanted
from tests.connectors.daemon.kit import IDENTITY, PAGES, SIZE, client_of, get, key_of, object_of, put
from tests.connectors.daemon.processes import Process, Stopped, client
from tests.connectors.daemon.told import Told
from tests.connectors.waiting import eventually, until
from umbp_connectors.daemon import follower
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.follower import PoolFollower
from umbp_connectors.daemon.pages import PageClient
from umbp_connectors.daemon.watches import QUIET_S
from umbp_connectors.pool import copies
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.errors import TierUnavailable, UmbpError
from umbp_core.tiers import Tier

Connect = Callable[..., DaemonPool]
CALL_S = 0.3
IN_TIME_S = 20.0
"""Until a call that has ``CALL_S`` has ended, on a machine that others use; without an end of its own it had 30."""
LEASE_S = 1.0
"""That of the role ``brief``."""


@pytest.fixture
def daemon(path: Path, closing: contextlib.ExitStack) -> Process:
    """A daemon in a process of its own."""
    return _daemon("serve", path, closing)


@pytest.fixture
def brief(path: Path, closing: contextlib.ExitStack) -> Process:
    """One with short leases."""
    return _daemon("brief", path, closing)


def _daemon(role: str, path: Path, closing: contextlib.ExitStack) -> Process:
    process = client(role, path)
    closing.callback(process.kill)
    return process


@pytest.fixture
def in_time() -> Callable[..., Any]:
    """Makes a call that has to end soon after its deadline."""

    def in_time(call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.monotonic()
        found = call(*arguments)
        assert time.monotonic() - began < IN_TIME_S
        return found

    return in_time


def held(pool: DaemonPool) -> int:
    """Objects in DRAM that are read or written."""
    stats = pool.stats(Tier.DRAM)
    return -1 if stats is None else stats.pinned + stats.reserved


def serves(pool: DaemonPool, numbers: range) -> bool:
    """Whether all of these can be stored, or are there, and are read as they are."""
    put(pool, numbers)
    return all(status.hit for status in get(pool, numbers))


def test_what_is_being_put_is_there_as_a_whole_or_not_at_all(
    daemon: Process, connect: Connect, in_time: Callable[..., Any]
) -> None:
    pool, other = connect(timeout_s=CALL_S), connect()
    staged = pool.stage([key_of(n) for n in range(4)], [object_of(n) for n in range(4)], timeout=30)
    with Stopped(daemon):
        assert in_time(staged.publish) is False, "nobody said that it is published"
        assert set(in_time(put, pool, range(10, 14))) <= {PutStatus.TIMED_OUT, PutStatus.NO_ROOM}
        assert in_time(pool.stage, [key_of(20)], [object_of(20)]).publish() is False
        assert not any(status.hit for status in in_time(get, pool, range(4)))
        assert in_time(pool.exists, [key_of(0)]) == [False]
        assert in_time(pool.count_prefix, [key_of(0)]) == 0
        assert in_time(pytest.raises, TierUnavailable, pool.clear)
        assert in_time(pool.stats, Tier.DRAM) is None
    until(lambda: held(other) == 0)
    for numbers in (range(4), range(10, 14), range(20, 21)):
        assert {status.hit for status in get(other, numbers)} in ({True}, {False})
        assert serves(other, numbers)
    until(lambda: serves(pool, range(4)))


def test_what_was_lent_before_is_read_to_its_end(
    daemon: Process, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = connect()
    put(pool, range(4))
    copy, stopped, copied = copies.copy_checksummed, contextlib.ExitStack(), threading.Lock()

    def stop_first(*arguments: Any) -> bytes:
        if copied.acquire(blocking=False):
            stopped.enter_context(Stopped(daemon))
        return copy(*arguments)

    with stopped:
        monkeypatch.setattr(copies, "copy_checksummed", stop_first)
        assert get(pool, range(4)) == [GetStatus.DRAM] * 4
        assert copied.locked()
    until(lambda: held(pool) == 0)


def test_what_is_copied_after_its_lease_does_not_count(
    brief: Process, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon hangs for longer than the lease, goes on, and gives the memory to somebody else in the meantime."""
    pool, other = connect(copy_threads=1), connect()
    put(pool, range(4))
    copy, reader = copies.copy_checksummed, threading.get_ident()
    done = threading.Event()

    def hang_first(*arguments: Any) -> bytes:
        if threading.get_ident() == reader and not done.is_set():
            done.set()
            with Stopped(brief):
                threading.Event().wait(LEASE_S + 0.2)
            filler = threading.Thread(target=fill)
            filler.start()
            filler.join(60)
        return copy(*arguments)

    def fill() -> None:
        until(lambda: held(other) == 0)
        for first in range(100, 100 + 2 * PAGES, 8):
            put(other, range(first, first + 8))
        assert other.exists([key_of(n) for n in range(4)]) == [False] * 4

    monkeypatch.setattr(copies, "copy_checksummed", hang_first)
    assert not any(status.hit for status in get(pool, range(4)))
    until(lambda: serves(pool, range(4)))  # within a lease


def test_a_leader_finds_out_which_of_its_words_were_heard(
    daemon: Process, path: Path, closing: contextlib.ExitStack
) -> None:
    mine = Engine(path, 2)
    closing.callback(mine.close)
    mine.open()
    pages = mine.take(4)
    assert mine.store(pages[:1], {0: object_of(0, 2 * SIZE)}) == [PutStatus.STORED]
    objects = {number: object_of(number, 2 * SIZE) for number in (1, 2)}
    with Stopped(daemon):
        written = [mine.write(page, number, objects[number]) for page, number in zip(pages[1:], objects, strict=False)]
        with pytest.raises(TimeoutError):
            mine.leader.publish(written, soon(CALL_S))
        with pytest.raises(TimeoutError):
            mine.leader.connect(soon(CALL_S))
    arena = mine.leader.connect(soon())
    assert arena.known
    taken = set(arena.taken)
    assert taken <= set(pages[1:])
    stored = {
        number: data for page, (number, data) in zip(pages[1:], objects.items(), strict=False) if page not in taken
    }
    assert mine.fetch([1, 2]) == stored, "what is not ours any more was published, and as it was written"
    rest = [each for each in written if each.page in taken]
    assert mine.leader.publish(rest, soon()) == [PutStatus.STORED] * len(rest)
    assert mine.fetch([0, 1, 2]) == {0: object_of(0, 2 * SIZE), **objects}


def test_a_loan_that_nobody_heard_of_ends_with_its_lease(
    brief: Process, path: Path, closing: contextlib.ExitStack
) -> None:
    mine = Engine(path, 2)
    closing.callback(mine.close)
    mine.open()
    mine.store(mine.take(2), {number: object_of(number, 2 * SIZE) for number in range(2)})
    lent, _ = mine.leader.borrow([key_of(0)], soon())
    with Stopped(brief):
        with pytest.raises(TimeoutError):
            mine.leader.borrow([key_of(1)], soon(CALL_S))
        threading.Event().wait(LEASE_S)
    assert mine.leader.connect(soon()).known
    until(lambda: mine.leader.fills(soon())[0].pinned == 0)
    mine.leader.give_back(lent, soon())
    assert mine.fetch([0, 1]) == {number: object_of(number, 2 * SIZE) for number in range(2)}


def test_who_follows_knows_that_nothing_can_be_loaded_and_later_that_it_can(
    daemon: Process, path: Path, connect: Connect, closing: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "SILENT_S", 2 * QUIET_S)
    put(connect(), range(4))
    told = Told()
    following = PoolFollower(path, IDENTITY.digest, told)
    closing.callback(following.close)
    following.open()
    until(lambda: len(told.held[Tier.DRAM]) == 4)
    with Stopped(daemon):
        until(lambda: not told.held[Tier.DRAM])
    assert eventually(lambda: told.held == {Tier.DRAM: {key_of(n) for n in range(4)}, Tier.SSD: set()})


def test_hundreds_who_knock_meanwhile_do_not_keep_it_from_serving(
    daemon: Process, path: Path, connect: Connect
) -> None:
    pool = connect()
    put(pool, range(4))
    began = time.monotonic()
    with Stopped(daemon):
        for number in range(200):
            page_client = PageClient(wanted(path, 2, f"engine {number}"))
            with pytest.raises((OSError, UmbpError)):
                page_client.connect(soon(0.005))
    until(lambda: get(pool, range(4)) == [GetStatus.DRAM] * 4)
    last = client_of(path)
    last.open()
    until(lambda: get(last, range(4)) == [GetStatus.DRAM] * 4)
    last.close()
    assert time.monotonic() - began < 60


def test_it_hangs_again_and_again_under_load(
    daemon: Process, path: Path, connect: Connect, closing: contextlib.ExitStack
) -> None:
    workers = [client("work", path), client("work", path)]
    for worker in workers:
        closing.callback(worker.kill)
    pool = connect(timeout_s=CALL_S)
    for _ in range(3):
        with Stopped(daemon):
            assert not any(status.hit for status in get(pool, range(8)))
            threading.Event().wait(0.3)
        until(lambda: serves(pool, range(8)))
    for worker in workers:
        assert worker.process.poll() is None
        assert "Traceback" not in worker.end()
        assert worker.process.returncode == 0, "it never saw a wrong byte"
    until(lambda: held(pool) == 0)
