"""What the two sides do with messages about pages without keys that nobody should send."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.engine import Engine, soon, wanted
from tests.connectors.daemon.impostor import Impostor
from tests.connectors.daemon.kit import PAGES, SIZE, key_of, object_of
from tests.connectors.talking import talk
from tests.connectors.waiting import until
from umbp_connectors.daemon import messages
from umbp_connectors.daemon.link import Link, attach
from umbp_connectors.daemon.messages import (
    Found,
    KeepPages,
    Lent,
    Lookup,
    NewObject,
    Place,
    Publish,
    Published,
    PublishPages,
    Reserve,
    ReturnPages,
    TakenPages,
    TakePages,
)
from umbp_connectors.daemon.pages import PageClient
from umbp_connectors.pool.outcomes import PutStatus
from umbp_core.errors import TierUnavailable
from umbp_core.wire.codes import WireError
from umbp_core.wire.frames import FrameType, encode_frame

Start = Callable[..., Daemon]
NEW = NewObject(0, b"k", 8, 0, bytes(32))


def _link(path: Path, **changes: object) -> Link:
    greeting = wanted(path, 2).greeting(b"l" * 16, 1)
    return attach(path, msgspec.structs.replace(greeting, **changes), None, False, soon())


@pytest.mark.parametrize(
    "request_",
    [
        TakePages(-1),
        TakePages(messages.PAGES + 1),
        KeepPages([-1]),
        KeepPages([0] * (messages.PAGES + 1)),
        ReturnPages([5]),
        ReturnPages([1 << 62]),
        PublishPages([NEW]),
        PublishPages([NEW, NEW]),
        PublishPages([msgspec.structs.replace(NEW, checksums=bytes(16))]),
        PublishPages([msgspec.structs.replace(NEW, checksums=b"")]),
        PublishPages([msgspec.structs.replace(NEW, checksums=bytes(16 * messages.STRIPES + 1))]),
        PublishPages([msgspec.structs.replace(NEW, key=b"")]),
        PublishPages([msgspec.structs.replace(NEW, key=b"k" * 257)]),
        PublishPages([msgspec.structs.replace(NEW, depth=-1)]),
        PublishPages([NEW] * (messages.OBJECTS + 1)),
        Reserve([b"k"], [8], [0]),
        Publish(1, [bytes(32)]),
    ],
    ids=lambda request: str(request)[:60],
)
def test_every_bound_is_kept(start: Start, path: Path, request_: messages.Request) -> None:
    daemon = start()
    engine = Engine(path, 2)
    engine.open()
    (page,) = engine.take(1)
    greeting = messages.encode(wanted(path, 2).greeting(b"l" * 16, 1))
    hello = encode_frame(FrameType.HELLO, 0, 0, greeting)
    request = encode_frame(FrameType.REQUEST, 0, 1, messages.encode(request_))
    later = encode_frame(FrameType.REQUEST, 0, 2, messages.encode(Lookup([b"k"], True)))
    assert messages.encode(Found(0, b"")) in talk(path, hello, later)
    assert messages.encode(Found(0, b"")) not in talk(path, hello, request, later), "the connection has ended"
    until(lambda: daemon.server.connections == 3)
    assert engine.store([page], {1: object_of(1, 2 * SIZE)})[0].kept
    assert engine.fetch([1]) == {1: object_of(1, 2 * SIZE)}
    engine.close()
    until(lambda: daemon.pinned() == 0)


def test_an_attach_that_contradicts_itself_is_refused(start: Start, path: Path) -> None:
    start()
    _link(path).close()
    prefixes = wanted(path, 2).greeting().prefixes
    for changes in (
        {"prefixes": prefixes[::-1]},
        {"prefixes": []},
        {"prefixes": [bytes(32)]},
        {"layout": b"x" * 32, "prefixes": [bytes(32)]},
        {"layout": b"x" * 32},
        {"object_bytes": 2 * SIZE, "prefixes": []},
    ):
        with pytest.raises(TierUnavailable, match=r"identity|divided|layout"):
            _link(path, **changes)
    for changes in ({"prefixes": [bytes(32)] * (messages.STRIPES + 1)}, {"prefixes": [b"x"]}, {"life": bytes(17)}):
        with pytest.raises(OSError, match="ended"):
            _link(path, **changes)


def test_the_number_of_a_loan_counts_on(start: Start, path: Path) -> None:
    """Over the connections of one life: an old number never ends a new loan."""
    daemon = start()
    engine = Engine(path)
    engine.open()
    engine.store(engine.take(2), {1: object_of(1), 2: object_of(2)})
    first, _ = engine.leader.borrow([key_of(1)], soon())
    engine.leader.connect(soon())
    second, _ = engine.leader.borrow([key_of(2)], soon())
    assert first < second
    assert daemon.pinned() == 2
    engine.leader.give_back(first, soon())
    until(lambda: daemon.pinned() == 1)
    engine.close()


@pytest.mark.parametrize(
    "answer",
    [
        TakenPages([4], False),
        TakenPages([1, 1], False),
        TakenPages([0, 1, 2], False),
        Published([0]),
        Published([0, 0, 0]),
        Published([9, 9]),
        "text",
    ],
    ids=str,
)
def test_a_daemon_that_answers_nonsense_gives_no_page(
    path: Path, closing: contextlib.ExitStack, answer: object
) -> None:
    impostor = Impostor(path, [TakenPages([], False), answer])
    closing.callback(impostor.close)
    for call in (
        lambda client: client.take_pages(2, soon()),
        lambda client: client.connected().publish_pages([NEW, NEW], soon()),
    ):
        client = PageClient(wanted(path))
        client.connect(soon())
        with pytest.raises(WireError):
            call(client)
        client.close()


def test_pages_that_nobody_asked_to_keep_are_not_ours(path: Path, closing: contextlib.ExitStack) -> None:
    closing.callback(Impostor(path, [TakenPages([3], True)]).close)
    with pytest.raises(WireError):
        PageClient(wanted(path)).connect(soon())


def test_what_does_not_fit_a_stripe_is_a_miss(path: Path, closing: contextlib.ExitStack) -> None:
    places = [Place(1, 0, SIZE, bytes(32)), Place(1, 1, SIZE + 1, bytes(32)), Place(3, 1, 0, b"")]
    closing.callback(Impostor(path, [TakenPages([], False), Lent(places)], page_bytes=2 * SIZE).close)
    client = PageClient(wanted(path, 2))
    client.connect(soon())
    _, found = client.borrow([b"a", b"b", b"c"], soon())
    assert [(place.status, place.nbytes) for place in found] == [(0, 0), (1, 1), (3, 0)]
    client.close()


def test_a_daemon_with_other_pages_is_none(path: Path, closing: contextlib.ExitStack) -> None:
    closing.callback(Impostor(path, [TakenPages([], False)], page_bytes=3 * SIZE).close)
    with pytest.raises(TierUnavailable, match="are wanted"):
        PageClient(wanted(path, 2)).connect(soon())


def test_the_old_connection_of_a_leader_that_came_back_changes_nothing(start: Start, path: Path) -> None:
    daemon = start()
    old, new = _link(path, life=b"m" * 16, turn=1), _link(path, life=b"m" * 16, turn=2)
    pages = new.take_pages(2, soon())
    _link(path, life=b"m" * 16, turn=1).close()  # the daemon comes to it late
    assert old.take_pages(2, soon()) == []
    assert old.keep_pages([], soon()).pages == []
    old.return_pages(pages, soon())
    (status,) = old.publish_pages([msgspec.structs.replace(NEW, page=pages[0])], soon())
    assert messages.PUBLISHED[status] is PutStatus.NO_ROOM
    assert set(new.keep_pages(pages, soon()).pages) == set(pages)
    (status,) = new.publish_pages([msgspec.structs.replace(NEW, page=pages[0])], soon())
    assert messages.PUBLISHED[status] is PutStatus.STORED
    more = new.take_pages(PAGES, soon())
    assert len(more) == PAGES // 2 - 1, "what the old connection asked for does not count"
    assert new.keep_pages(pages[1:], soon()).pages == pages[1:]
    assert len(old.borrow([b"k"], soon())[1]) == 1
    assert daemon.pinned() == 1, "its loan has ended already"
    old.close()
    assert new.look_up([b"k"], True, soon()).prefix == 1
    assert daemon.pinned() == 1
    new.close()
    until(lambda: daemon.pinned() == 0)
