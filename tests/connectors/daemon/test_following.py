"""What a pool of the daemon holds, as one hears who follows it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.engine import soon
from tests.connectors.daemon.kit import IDENTITY, PAGES, SIZE, get, key_of, put
from tests.connectors.daemon.told import Held, Told, truth
from tests.connectors.talking import talk
from tests.connectors.waiting import until
from umbp_connectors.daemon import messages, session
from umbp_connectors.daemon import news as news_kinds
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.follower import PoolFollower
from umbp_connectors.daemon.link import follow
from umbp_connectors.daemon.news import Changed, Follow, Listed, Turn
from umbp_connectors.daemon.watches import Watch
from umbp_connectors.pool.books import Contents
from umbp_connectors.pool.outcomes import GetStatus
from umbp_core.directory import Change, EventKind
from umbp_core.errors import StateError, TierUnavailable
from umbp_core.ids import IDENTITY_BYTES
from umbp_core.tiers import Tier
from umbp_core.wire.codes import WireError
from umbp_core.wire.frames import FrameType, encode_frame

Start = Callable[..., Daemon]
Connect = Callable[..., DaemonPool]
NOTHING: Held = {Tier.DRAM: set(), Tier.SSD: set()}


@pytest.fixture
def listen(path: Path, closing: contextlib.ExitStack) -> Callable[[], Told]:
    """Somebody follows the pool of the tests."""

    def listen() -> Told:
        told = Told()
        follower = PoolFollower(path, IDENTITY.digest, told)
        closing.callback(follower.close)
        follower.open()
        return told

    return listen


def test_what_comes_and_goes_is_told(
    start: Start, connect: Connect, listen: Callable[[], Told], tmp_path: Path
) -> None:
    daemon = start(ssd_dir=tmp_path / "ssd", ssd_capacity=16 << 20)
    pool = connect()
    put(pool, range(4))
    told = listen()
    until(lambda: told.held == truth(daemon))
    for first in range(0, 2 * PAGES, 16):  # demoted, and evicted from DRAM
        put(pool, range(first, first + 16))
        assert pool.flush(30)
    until(lambda: told.held == truth(daemon))
    assert len(told.held[Tier.SSD]) == 2 * PAGES > len(told.held[Tier.DRAM]) > 0
    gone = next(number for number in range(2 * PAGES) if key_of(number) not in told.held[Tier.DRAM])
    assert get(pool, [gone]) == [GetStatus.SSD]
    until(lambda: key_of(gone) in told.held[Tier.DRAM])
    late = listen()
    until(lambda: late.held == told.held == truth(daemon))
    assert connect().clear()
    until(lambda: told.held == late.held == NOTHING)


def test_another_pool_is_not_told_of(start: Start, connect: Connect, listen: Callable[[], Told]) -> None:
    start()
    pool, other = connect(), connect(replace(IDENTITY, namespace="another"))
    told = listen()
    put(other, range(8))
    put(pool, [9])
    until(lambda: bool(told.held[Tier.DRAM]))
    assert told.held[Tier.DRAM] == {key_of(9)}


def test_another_daemon_has_what_it_finds_on_ssd(
    start: Start, connect: Connect, closing: contextlib.ExitStack, tmp_path: Path
) -> None:
    ssd = {"ssd_dir": tmp_path / "ssd", "ssd_capacity": 16 << 20}
    first = start(**ssd)
    told = Told()
    pool = connect(observer=told)
    put(pool, range(8))
    assert pool.flush(30)
    until(lambda: told.held == truth(first))
    first.close()
    until(lambda: told.held == NOTHING)
    second = start(**ssd)
    # Nobody called: the client came back for this alone.
    until(lambda: len(told.held[Tier.SSD]) == 8 and told.held == truth(second))
    assert not told.held[Tier.DRAM]
    pool.close()
    put(connect(), [77])
    assert key_of(77) not in told.held[Tier.DRAM], "whoever closed its pool is told no more"


def test_a_pool_that_makes_room_is_gone_until_its_client_is_back(
    start: Start, connect: Connect, listen: Callable[[], Told]
) -> None:
    daemon = start(dram_capacity=PAGES * SIZE)
    pool = connect()
    put(pool, range(4))
    told = listen()
    until(lambda: told.held == truth(daemon) != NOTHING)
    pool.close()
    until(lambda: daemon.server.connections == 1)
    assert daemon.server.idle_s > 0, "who only listens uses nothing"
    other = connect(replace(IDENTITY, namespace="another"))
    until(lambda: told.held == NOTHING)
    other.close()
    until(lambda: daemon.server.connections == 0)
    back = connect()
    put(back, [7])
    until(lambda: told.held[Tier.DRAM] == {key_of(7)})


def test_a_listener_that_does_not_listen_is_given_up(
    start: Start, connect: Connect, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, pool = start(), connect()
    put(pool, [0])
    before = daemon.server.connections
    deaf = follow(path, IDENTITY.digest, soon())
    until(lambda: daemon.server.connections == before + 1)

    def given_up() -> bool:
        pool.clear()
        put(pool, range(PAGES))
        return daemon.server.connections == before

    with monkeypatch.context() as patch:  # who listens has greeted in time
        patch.setattr(session, "TALK_S", 1.0)
        patch.setattr(session, "GATHER_S", 0.0)
        until(given_up)
    deaf.close()
    assert get(pool, [1]) == [GetStatus.DRAM]


def test_when_too_much_happens_at_once_everything_is_listed_anew() -> None:
    watch = Watch(most=4)
    assert watch.take(0) is None, "at first, too"
    for number in range(4):
        watch.note([Change(EventKind.ADDED, Tier.DRAM, [key_of(number)], ())])
    changes = watch.take(0)
    assert changes is not None
    assert [change.keys for change in changes] == [[key_of(number)] for number in range(4)]
    assert watch.take(0) == []
    watch.note([Change(EventKind.ADDED, Tier.DRAM, [key_of(number) for number in range(5)], ())])
    watch.note([Change(EventKind.REMOVED, Tier.DRAM, [key_of(0)], ())])
    assert watch.take(0) is None


def test_whoever_is_stopped_does_not_wait_for_those_who_follow(
    start: Start, connect: Connect, listen: Callable[[], Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "QUIET_S", 60.0)
    daemon, pool, told = start(), connect(), listen()
    put(pool, [1])
    until(lambda: told.held == truth(daemon))
    pool.close()
    began = time.monotonic()
    daemon.server.close(120)
    assert time.monotonic() - began < 60
    until(lambda: told.held == NOTHING)


def test_what_nobody_should_ask_or_say(start: Start, connect: Connect, path: Path) -> None:
    daemon = start()
    put(connect(), [1])
    before = daemon.server.connections
    for hello in (Follow(messages.REVISION, b"short"), Follow(messages.REVISION, bytes(IDENTITY_BYTES + 1)), ["x", 1]):
        assert talk(path, encode_frame(FrameType.HELLO, 0, 0, messages.encode(hello))) == b""
    for greeting, why in (
        (Follow(messages.REVISION + 1, IDENTITY.digest), b"run the same version"),
        (Follow(messages.REVISION, bytes(IDENTITY_BYTES)), b"no such pool"),
    ):
        assert why in talk(path, encode_frame(FrameType.HELLO, 0, 0, messages.encode(greeting)))
    link = follow(path, bytes(IDENTITY_BYTES), soon())
    with pytest.raises(TierUnavailable, match="no such pool"):
        link.receive(soon())
    link.close()
    for news in (
        Listed(Tier.DRAM, [b""], True),
        Listed(Tier.DRAM, [b"k"] * (news_kinds.KEYS + 1), True),
        Changed([Turn(True, Tier.DRAM, [b"k" * 257])]),
        [43, 9, [], True],
        [99],
        "text",
    ):
        with pytest.raises(WireError):
            messages.decode_news(memoryview(messages.encode(news)))
    until(lambda: daemon.server.connections == before)


def test_an_observer_is_named_before_the_pool_is_open(start: Start, connect: Connect) -> None:
    start()
    pool = connect()
    pool.call_observer()
    with pytest.raises(StateError, match="before"):
        pool.observe(Told())


def test_what_was_put_off_can_be_said_at_any_time(start: Start, connect: Connect) -> None:
    class Late(Told):
        calls = 0

        def changed(self, changes: Sequence[Change], contents: Contents) -> None:
            super().changed(changes, contents)
            self.calls += not changes

    start()
    late = Late()
    pool = connect(observer=late)
    put(pool, [1])
    until(lambda: late.held[Tier.DRAM] == {key_of(1)})
    calls = late.calls
    pool.call_observer()
    assert late.calls > calls
