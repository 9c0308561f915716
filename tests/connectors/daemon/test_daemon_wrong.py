"""What the two sides do with bytes that they do not understand, and with clients that want too much."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.impostor import Impostor
from tests.connectors.daemon.kit import IDENTITY, PAGES, SIZE, client_of, get, key_of, object_of, put
from tests.connectors.talking import talk
from tests.connectors.waiting import until
from umbp_connectors.daemon import holdings, messages
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.link import Link, attach
from umbp_connectors.daemon.messages import (
    Attach,
    Borrow,
    Count,
    Flush,
    Found,
    Granted,
    Lent,
    Lookup,
    Place,
    Publish,
    Reserve,
    Return,
)
from umbp_connectors.pool import copies
from umbp_connectors.pool.checksums import object_checksum
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.errors import ConfigError, TierUnavailable
from umbp_core.wire.codes import WireError
from umbp_core.wire.frames import FrameType, encode_frame

Start = Callable[..., Daemon]
Connect = Callable[..., DaemonPool]

GREETING = Attach(
    messages.REVISION,
    b"c" * 16,
    IDENTITY.namespace,
    IDENTITY.layout,
    messages.scope_of(IDENTITY),
    SIZE,
    PAGES * SIZE,
    0,
    1,
    1.0,
    b"",
    "a test",
)


def _hello(**changes: object) -> bytes:
    return encode_frame(FrameType.HELLO, 0, 0, messages.encode(msgspec.structs.replace(GREETING, **changes)))


def _request(payload: bytes, sequence: int = 1) -> bytes:
    return encode_frame(FrameType.REQUEST, 0, sequence, payload)


def _attach(path: Path, **changes: object) -> Link:
    greeting = msgspec.structs.replace(GREETING, **changes)
    return attach(path, greeting, None, False, time.monotonic() + 30)


def _reserve(link: Link, keys: list[bytes]) -> tuple[int, list[int]]:
    """The number of a grant, and its pages."""
    number = link.ask_pages(keys, [SIZE] * len(keys), [0] * len(keys), _later())
    return number, link.granted(number, len(keys), _later())


def _later() -> float:
    return time.monotonic() + 30


def test_every_bound_of_a_request_is_kept(start: Start, path: Path, connect: Connect) -> None:
    daemon = start()
    put(connect(), [1])
    welcome = talk(path, _hello())
    many = messages.OBJECTS + 1
    for payload in (
        b"",
        b"\xc1",
        messages.encode([99, []]),
        messages.encode(Lookup([b"k"] * (messages.KEYS + 1), False)),
        messages.encode(Lookup([b"k" * 257], False)),
        messages.encode(Lookup([b""], False)),
        messages.encode(Borrow([b"k"] * many, 1)),
        messages.encode(Borrow([b"k"], messages.TIMEOUT_MS + 1)),
        messages.encode(Borrow([b"k"], -1)),
        messages.encode(Reserve([b"k"] * many, [1] * many, [0] * many)),
        messages.encode(Reserve([b"k"], [1, 2], [0])),
        messages.encode(Reserve([b"k"], [1], [-1])),
        messages.encode(Publish(1, [b"k" * 17])),
        messages.encode(Publish(99, [b"k" * 16])),
        messages.encode(Flush(-1)),
        messages.encode([12, ["text"], 1]),
    ):
        assert talk(path, _hello(), _request(payload)) == welcome, payload
    for frame in (
        b"GET / HTTP/1.1\r\n\r\n" * 9,
        encode_frame(FrameType.REQUEST, 7, 1, b""),
        encode_frame(FrameType.EVENT, 0, 1, b""),
        encode_frame(FrameType.REQUEST, 0, 1, b"")[:32] + (messages.FRAME_BYTES + 1).to_bytes(4, "little") + bytes(4),
        _hello(),
    ):
        assert talk(path, _hello(), frame) == welcome
    for hello in (
        encode_frame(FrameType.HELLO, 0, 0, bytes(messages.GREETING_BYTES + 1)),
        encode_frame(FrameType.HELLO, 0, 0, b"\x00"),
        _hello(object_bytes=0),
        _hello(ssd_share=1.5),
        _hello(client=b"short"),
        _hello(namespace="n" * 2000),
        _hello()[:-1],
    ):
        assert talk(path, hello) == b""
    until(lambda: daemon.server.connections == 2)
    assert get(connect(), [1]) == [GetStatus.DRAM]
    assert len(daemon.keeper.pools()) == 1
    until(lambda: daemon.pinned() == 0)


def test_another_revision_is_told_why(start: Start, path: Path) -> None:
    start()
    assert b"run the same version" in talk(path, _hello(revision=messages.REVISION + 1))


def test_a_process_of_another_user_is_not_even_answered(
    start: Start, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    assert talk(path, _hello())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert talk(path, _hello()) == b""


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=120), max_size=4), st.booleans())
def test_any_bytes_leave_the_daemon_working(once: DaemonPool, path: Path, parts: list[bytes], greets: bool) -> None:
    talk(path, *([_hello()] if greets else []), *parts)
    assert once.exists([key_of(0), b"none"]) == [True, False]


@pytest.fixture
def once(start: Start, connect: Connect) -> DaemonPool:
    start()
    pool = connect()
    put(pool, [0])
    return pool


def test_too_many_connections_are_refused(start: Start, connect: Connect, path: Path) -> None:
    start(max_connections=2)
    links = [_attach(path) for _ in range(2)]
    with pytest.raises(TierUnavailable, match="too many connections"):
        _attach(path)
    pool = connect()
    assert put(pool, [1]) == [PutStatus.NO_ROOM]
    for link in links:
        link.close()
    until(lambda: put(pool, [1]) == [PutStatus.STORED])


def test_a_path_that_is_in_use_or_wrong(start: Start, path: Path) -> None:
    start()
    with pytest.raises(ConfigError, match="a daemon is running"):
        start()
    path.with_name("file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a socket"):
        Daemon(path.with_name("file"))


def test_a_daemon_whose_lock_was_tidied_away_keeps_its_path(start: Start, path: Path, connect: Connect) -> None:
    start()
    path.with_name(f"{path.name}.lock").unlink()
    with pytest.raises(ConfigError, match="running at"):
        start()
    assert put(connect(), [1]) == [PutStatus.STORED]


def test_a_client_may_hold_half_of_the_arena(start: Start, path: Path) -> None:
    daemon = start()
    link, other = _attach(path), _attach(path, client=b"d" * 16)
    keys = [key_of(number) for number in range(PAGES)]
    _, places = _reserve(link, keys)
    assert len(places) == PAGES // 4, "there are two clients"
    assert _reserve(link, keys[40:42])[1] == []
    assert len(_reserve(other, keys[32:])[1]) == PAGES // 4
    assert daemon.pinned() == PAGES // 2
    assert other.borrow(keys[:1], _later())[1] == [], "it holds all that it may"
    link.close()
    (kept,) = daemon.keeper.pools()
    until(lambda: len(kept.clients) == 1)
    assert daemon.pinned() == PAGES // 4
    assert len(_reserve(other, keys[:1])[1]) == 1, "it is alone now"
    other.close()
    until(lambda: daemon.pinned() == 0)


def test_what_is_held_counts_until_it_is_over(start: Start, path: Path, connect: Connect) -> None:
    daemon = start()
    put(connect(), range(10))
    link = _attach(path)
    keys = [key_of(number) for number in range(PAGES)]
    for _ in range(3 * PAGES):  # nothing is lost on the way
        number, places = link.borrow(keys[:16], _later())
        assert [messages.LENT[place.status] for place in places] == [GetStatus.DRAM] * 10 + [GetStatus.MISS] * 6
        link.give_back(number, _later())
        number, granted = _reserve(link, keys[8:14])
        assert granted[:2] == [-1, -1]
        assert all(place >= 0 for place in granted[2:])
        link.give_back(number, _later())
    assert link.stats(_later()).fills[0].pinned == 0
    assert daemon.pinned() == 0
    link.close()


def test_a_client_that_holds_too_many_loans_and_grants_gets_no_more_until_one_ends(
    start: Start, path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "HELD", 4)
    daemon = start()
    put(connect(), range(4))
    link = _attach(path)
    loans = [link.borrow([key_of(number)], _later())[0] for number in range(3)]
    grant, places = _reserve(link, [key_of(9)])
    assert len(places) == 1
    assert link.borrow([key_of(3)], _later())[1] == []
    assert _reserve(link, [key_of(10)])[1] == []
    assert daemon.pinned() == 4
    link.give_back(loans[0], _later())
    number, lent = link.borrow([key_of(3)], _later())
    assert [messages.LENT[place.status] for place in lent] == [GetStatus.DRAM]
    for held in (*loans[1:], number, grant):
        link.give_back(held, _later())
    assert link.stats(_later()).fills[0].pinned == daemon.pinned() == 0
    link.close()


def test_loans_and_grants_of_nothing_are_not_held(start: Start, path: Path) -> None:
    """A client that has all that it may have goes on asking, and gets on when it has given something back."""
    start()
    link = _attach(path)
    keys = [key_of(number) for number in range(PAGES)]
    number, places = _reserve(link, keys)
    assert len(places) == PAGES // 2
    for _ in range(messages.HELD + 1):
        assert _reserve(link, keys[-1:])[1] == []
        assert link.borrow(keys[-1:], _later())[1] == []
    link.give_back(number, _later())
    assert [len(_reserve(link, [key])[1]) for key in keys[-3:]] == [1, 1, 1]
    link.close()


def test_numbers_of_loans_and_grants(start: Start, path: Path) -> None:
    daemon = start()
    for wrong in (
        _request(messages.encode(Publish(5, []))),
        _request(messages.encode(Reserve([b"a"], [8], [0])), 3) + _request(messages.encode(Borrow([b"b"], 1)), 3),
        _request(messages.encode(Reserve([b"a"], [8], [0])), 3) + _request(messages.encode(Publish(3, [b"", b""])), 4),
        _request(messages.encode(Reserve([b"a"], [8], [0])), 3) + _request(messages.encode(Publish(3, [b"short"])), 4),
    ):
        first = talk(path, _hello(), wrong, _request(messages.encode(Lookup([b"a"], True)), 9))
        assert messages.encode(Found(0, b"")) not in first[200:], "the connection has ended"
        until(lambda: daemon.pinned() == 0)
    answered = talk(path, _hello(), _request(messages.encode(Return(77))), _request(messages.encode(Flush(1)), 2))
    assert answered.endswith(messages.encode(Count(1))), "what is over already may be returned"


def test_a_lease_ends_and_the_connection_goes_on(
    start: Start, path: Path, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = start(lease_s=0.1)
    put(connect(), range(4))
    link = _attach(path)
    number, places = link.borrow([key_of(number) for number in range(4)], _later())
    assert len(places) == 4
    until(lambda: "its lease has ended" in caplog.text)
    assert daemon.pinned() == 0
    link.give_back(number, _later())
    assert link.look_up([key_of(1)], True, _later()).prefix == 1
    link.close()


def test_what_is_copied_after_the_lease_does_not_count(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(lease_s=0.05)
    pool = connect()
    put(pool, [1])
    copy = copies.copy_checksummed

    def slow(*arguments: object) -> bytes:
        threading.Event().wait(0.1)
        return copy(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(copies, "copy_checksummed", slow)
    assert get(pool, [1]) == [GetStatus.TIMED_OUT]
    monkeypatch.setattr(copies, "copy_checksummed", copy)
    until(lambda: get(pool, [1]) == [GetStatus.DRAM])


@pytest.fixture
def impostor(path: Path) -> Iterator[Callable[..., Impostor]]:
    with contextlib.ExitStack() as closing:

        def impostor(answer: object, pages: int = 4, size: int = 4 * SIZE) -> Impostor:
            made = Impostor(path, [answer], pages, size)
            closing.callback(made.close)
            return made

        yield impostor


@pytest.mark.parametrize(
    "answer",
    [
        Lent([Place(1, 4, SIZE, bytes(16))]),
        Lent([Place(1, 0, SIZE + 1, bytes(16))]),
        Lent([Place(1, 0, SIZE, bytes(16))] * 2),
        Lent([Place(1, 0, SIZE, b"x" * 16)]),
        Granted([0]),
        Found(1, b"\x01"),
        "text",
    ],
    ids=str,
)
def test_a_daemon_that_answers_nonsense_costs_misses(
    impostor: Callable[..., Impostor], path: Path, answer: object
) -> None:
    impostor(answer)
    pool = client_of(path, timeout_s=2.0)
    pool.open()
    buffer = bytearray(SIZE)
    (status,) = pool.get([key_of(0)], [buffer])
    assert not status.hit
    assert pool.failed > 0
    pool.close()


@pytest.mark.parametrize("places", [[4], [0, 1], [-4]])
def test_pages_outside_of_the_arena_are_never_written(
    impostor: Callable[..., Impostor], path: Path, places: list[int]
) -> None:
    impostor(Granted(places))
    link = _attach(path)
    with pytest.raises(WireError):
        _reserve(link, [b"a"])
    link.close()


def test_memory_that_is_too_small_is_not_mapped(impostor: Callable[..., Impostor], path: Path) -> None:
    impostor(Found(0, b""), size=4 * SIZE - 1)
    with pytest.raises(TierUnavailable, match="instead of"):
        _attach(path)


def test_what_the_daemon_says_is_there_has_to_verify(impostor: Callable[..., Impostor], path: Path) -> None:
    zeros = object_checksum(IDENTITY.object_key(key_of(0)), bytes(SIZE))
    impostor(Lent([Place(1, 0, SIZE, zeros)]))
    pool = client_of(path)
    pool.open()
    buffer = bytearray(b"x" * SIZE)
    assert pool.get([key_of(0)], [buffer]) == [GetStatus.DRAM]
    assert buffer == bytes(SIZE) != object_of(0)
    pool.close()
