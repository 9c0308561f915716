"""Following a master over what happens to it and to the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.master.native.harness import DEADLINE, DRAM, FakeMaster, RawServerEnd
from umbp_connectors.client.native_async import NativeAsyncClient
from umbp_connectors.client.watching import Notice, Turn, Watcher
from umbp_core.breaker import Backoff
from umbp_core.errors import AccessDenied, MasterUnavailable
from umbp_core.index_feed import FeedPage
from umbp_core.wire.frames import FrameType
from umbp_core.wire.hashes import pack_hashes

CHANGES = 136
SOON = Backoff(first=0.001, ceiling=0.002)
Script = Callable[[RawServerEnd], None]


def asked_to_watch(incarnation: int, cursor: int, *events: list[Any]) -> Script:
    """A connection on which a watch from there is asked for; it answers ``events`` and ends."""

    def script(end: RawServerEnd) -> None:
        end.welcome()
        assert end.receive()[2] == [36, incarnation, cursor]
        for event in events:
            end.send(FrameType.EVENT, 1, event)

    return script


def greeted(end: RawServerEnd) -> None:
    """The connection by which the client finds out that the master answers."""
    end.welcome()


def refused(end: RawServerEnd) -> None:
    """A master that wants a token."""
    end.receive()
    end.send(FrameType.ERROR, 0, [3, 3, "a token is wanted"], session=0)


def changes(incarnation: int, cursor: int, *hashes: bytes, lost: bool = False) -> list[Any]:
    rows = [[cursor, 1, "n", DRAM, pack_hashes(hashes)]] if hashes else []
    return [CHANGES, incarnation, cursor, lost, rows]


def followed(count: int, *addresses: str) -> list[Notice | FeedPage]:
    """The first ``count`` things that a watcher tells."""

    async def follow() -> list[Notice | FeedPage]:
        connect = [partial(NativeAsyncClient, path) for path in addresses]
        found: list[Notice | FeedPage] = []
        async with aclosing(Watcher(connect, DEADLINE, backoff=SOON).follow()) as told:
            async for each in told:
                found.append(each)
                if len(found) == count:
                    break
        return found

    return asyncio.run(asyncio.wait_for(follow(), DEADLINE))


def turns(told: list[Notice | FeedPage]) -> list[Turn | tuple[bytes, ...]]:
    return [each.turn if isinstance(each, Notice) else each.changes[0].hashes for each in told]


def test_goes_on_where_it_was_and_says_what_it_missed(tmp_path: Path) -> None:
    scripts = [
        greeted,
        asked_to_watch(0, 0, changes(7, 3, lost=True), changes(7, 4, b"a", b"b"), changes(7, 4)),
        greeted,
        asked_to_watch(7, 4, changes(7, 5, b"c")),
        greeted,
        asked_to_watch(7, 5, changes(7, 25, lost=True), changes(7, 26, b"d")),
        greeted,
        asked_to_watch(7, 26, changes(8, 2, lost=True), changes(8, 3, b"e")),
    ]
    with FakeMaster(tmp_path / "s", *scripts) as fake:
        told = followed(14, fake.address)
    assert turns(told) == [
        *(Turn.CONNECTED, Turn.FOLLOWING, (b"a", b"b"), Turn.AWAY),
        *(Turn.CONNECTED, (b"c",), Turn.AWAY),
        *(Turn.CONNECTED, Turn.MISSED, (b"d",), Turn.AWAY),
        *(Turn.CONNECTED, Turn.RESTARTED, (b"e",)),
    ]
    notices = {each.turn: each for each in told if isinstance(each, Notice)}
    assert notices[Turn.MISSED] == Notice(Turn.MISSED, fake.address, 7, 25, missed=20)
    assert notices[Turn.RESTARTED] == Notice(Turn.RESTARTED, fake.address, 8, 2)
    assert "closed the connection" in notices[Turn.AWAY].reason


def test_the_first_address_that_answers_is_followed_and_the_best_one_tried_first_again(tmp_path: Path) -> None:
    best, other = str(tmp_path / "best"), tmp_path / "other"
    with FakeMaster(other, greeted, asked_to_watch(0, 0, changes(7, 3, lost=True))) as fake:
        told = followed(3, best, fake.address)
    assert turns(told) == [Turn.CONNECTED, Turn.FOLLOWING, Turn.AWAY]
    assert isinstance(told[0], Notice)
    assert told[0].master == fake.address


def test_a_master_that_never_answered_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(MasterUnavailable, match=r"no master answers: .*/a is not reached.*; .*/b is not reached"):
        followed(1, str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_refusal_ends_the_watch(tmp_path: Path) -> None:
    scripts = [greeted, asked_to_watch(0, 0, changes(7, 3, lost=True)), refused]
    with FakeMaster(tmp_path / "s", *scripts) as fake, pytest.raises(AccessDenied, match="a token is wanted"):
        followed(9, fake.address)
