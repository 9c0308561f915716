"""The blocking client against masters that do not do what they should."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from time import monotonic

import pytest

from tests.master.native.harness import DEADLINE, DRAM, FakeMaster, Master, RawServerEnd, client, hashes_of
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_connectors.client.native_session import Identity
from umbp_core.errors import AccessDenied, InvalidRequest, MasterError, MasterUnavailable, ProtocolError
from umbp_core.master.model import Registration
from umbp_core.wire import bounds
from umbp_core.wire.codes import ErrorCode
from umbp_core.wire.frames import FrameType, encode_frame

SHORT = 0.1
"""Seconds after which a client gives up."""
FOUND = 116


def silent(end: RawServerEnd) -> None:
    """Greets, takes everything and says nothing."""
    end.welcome()
    end.until_closed()


def found(end: RawServerEnd) -> None:
    """Answers one lookup: it is there."""
    end.welcome()
    _, sequence, _ = end.receive()
    end.send(FrameType.REPLY, sequence, [FOUND, b"\1"])
    end.until_closed()


def test_a_deadline_is_kept_when_nothing_comes(tmp_path: Path) -> None:
    with FakeMaster(tmp_path / "s", silent) as fake, client(fake.address) as it:
        it.open(DEADLINE)
        began = monotonic()
        with pytest.raises(MasterUnavailable, match="no answer in time"):
            it.lookup([b"k"], SHORT)
        assert SHORT <= monotonic() - began < DEADLINE


def test_a_deadline_is_kept_while_greeting(tmp_path: Path) -> None:
    """By a master that never takes the connection from the system's hands."""
    with FakeMaster(tmp_path / "s") as fake, client(fake.address) as it:
        began = monotonic()
        with pytest.raises(MasterUnavailable, match="no answer in time"):
            it.lookup([b"k"], SHORT)
        assert monotonic() - began < DEADLINE


def test_a_deadline_is_kept_when_an_answer_drips(tmp_path: Path) -> None:
    given_up = threading.Event()

    def drip(end: RawServerEnd) -> None:
        end.welcome()
        end.receive()
        answer = encode_frame(FrameType.REPLY, end.SESSION, 1, bytes(1 << 16))
        with contextlib.suppress(OSError):  # who gives up closes before it says so
            for at in range(len(answer)):
                end.socket.send(answer[at : at + 1])
                if given_up.wait(SHORT / 4):
                    break

    with FakeMaster(tmp_path / "s", drip) as fake, client(fake.address) as it:
        it.open(DEADLINE)
        began = monotonic()
        with pytest.raises(MasterUnavailable, match="no answer in time"):
            it.lookup([b"k"], SHORT)
        given_up.set()
        assert monotonic() - began < DEADLINE


def test_a_deadline_is_kept_when_nobody_reads(tmp_path: Path) -> None:
    given_up = threading.Event()

    def greets_and_sleeps(end: RawServerEnd) -> None:
        end.welcome()
        assert given_up.wait(DEADLINE)

    with FakeMaster(tmp_path / "s", greets_and_sleeps) as fake, client(fake.address) as it:
        it.open(DEADLINE)
        began = monotonic()
        with pytest.raises(MasterUnavailable, match="no answer in time"):
            it.lookup([bytes(1000) for _ in range(10_000)], SHORT)
        given_up.set()
        assert monotonic() - began < DEADLINE


def test_a_late_answer_finds_nobody(tmp_path: Path) -> None:
    def late(end: RawServerEnd) -> None:
        end.welcome()
        end.receive()
        end.until_closed()
        with pytest.raises(OSError, match=r"pipe|reset"):
            end.send(FrameType.REPLY, 1, [FOUND, b"\1"])

    def not_there(end: RawServerEnd) -> None:
        end.welcome()
        _, sequence, _ = end.receive()
        end.send(FrameType.REPLY, sequence, [FOUND, b"\0"])
        end.until_closed()

    with FakeMaster(tmp_path / "s", late, not_there) as fake, client(fake.address) as it:
        it.open(DEADLINE)
        with pytest.raises(MasterUnavailable):
            it.lookup([b"k"], SHORT)
        assert it.lookup([b"k"], DEADLINE) == [False]


@pytest.mark.parametrize("sequence", [0, 2, 2**63])
def test_an_answer_to_something_else_ends_the_connection(tmp_path: Path, sequence: int) -> None:
    def confused(end: RawServerEnd) -> None:
        end.welcome()
        end.receive()
        end.send(FrameType.REPLY, sequence, [FOUND, b"\1"])
        end.until_closed()

    with FakeMaster(tmp_path / "s", confused, found) as fake, client(fake.address) as it:
        with pytest.raises(ProtocolError, match=f"an answer to request {sequence}, not 1"):
            it.lookup([b"k"], DEADLINE)
        assert it.lookup([b"k"], DEADLINE) == [True]


WRONG_ANSWERS = {
    "another session": encode_frame(FrameType.REPLY, 6, 1, b""),
    "another protocol": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "a request": encode_frame(FrameType.REQUEST, 5, 1, b""),
    "too much": encode_frame(FrameType.REPLY, 5, 1, b"")[:32] + b"\xff\xff\xff\x7f" + bytes(4),
    "another message": encode_frame(FrameType.REPLY, 5, 1, b"\x91\x04"),
    "garbage": encode_frame(FrameType.REPLY, 5, 1, b"\xff\xff\xff"),
    "two answers": 2 * encode_frame(FrameType.REPLY, 5, 1, b"\x92\x74\xc4\x01\x01"),
    "an error that is none": encode_frame(FrameType.ERROR, 5, 1, b"\x90"),
}


@pytest.mark.parametrize("answer", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_an_answer_that_is_not_understood_ends_the_connection(tmp_path: Path, answer: bytes) -> None:
    def wrong(end: RawServerEnd) -> None:
        end.welcome()
        end.receive()
        end.socket.sendall(answer)
        end.until_closed()

    with FakeMaster(tmp_path / "s", wrong, found) as fake, client(fake.address) as it:
        with pytest.raises(ProtocolError):
            it.lookup([b"k"], DEADLINE)
        assert it.lookup([b"k"], DEADLINE) == [True]


@pytest.mark.parametrize("greeting", [b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(40), bytes(100)])
def test_another_service_is_found_out(tmp_path: Path, greeting: bytes) -> None:
    def another(end: RawServerEnd) -> None:
        end.socket.sendall(greeting)
        end.until_closed()

    with FakeMaster(tmp_path / "s", another) as fake, client(fake.address) as it:  # noqa: SIM117 - the master outlives it
        with pytest.raises(ProtocolError, match="another service"):
            it.open(DEADLINE)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.INVALID_REQUEST, InvalidRequest),
        (ErrorCode.UNKNOWN_MESSAGE, InvalidRequest),
        (ErrorCode.UNAVAILABLE, MasterUnavailable),
        (ErrorCode.INTERNAL, MasterError),
        (4711, MasterError),
    ],
)
def test_an_error_is_raised_and_the_connection_goes_on(tmp_path: Path, code: int, kind: type[MasterError]) -> None:
    def refuses_once(end: RawServerEnd) -> None:
        end.welcome()
        _, sequence, _ = end.receive()
        end.send(FrameType.ERROR, sequence, [3, code, "because"])
        _, sequence, _ = end.receive()
        end.send(FrameType.REPLY, sequence, [FOUND, b"\1"])
        end.until_closed()

    with FakeMaster(tmp_path / "s", refuses_once) as fake, client(fake.address) as it:
        with pytest.raises(kind, match="because") as caught:
            it.lookup([b"k"], DEADLINE)
        assert type(caught.value) is kind
        assert it.lookup([b"k"], DEADLINE) == [True]


def test_an_error_of_the_connection_ends_it(tmp_path: Path) -> None:
    def stops(end: RawServerEnd) -> None:
        end.welcome()
        end.receive()
        end.send(FrameType.ERROR, 0, [3, ErrorCode.UNAVAILABLE, "the master stops"])
        end.until_closed()

    with FakeMaster(tmp_path / "s", stops, found) as fake, client(fake.address) as it:
        with pytest.raises(MasterUnavailable, match="the master stops"):
            it.lookup([b"k"], DEADLINE)
        assert it.lookup([b"k"], DEADLINE) == [True]


def test_a_connection_that_broke_is_made_anew(tmp_path: Path) -> None:
    def breaks(end: RawServerEnd) -> None:
        end.welcome()
        end.receive()

    with FakeMaster(tmp_path / "s", breaks, found) as fake, client(fake.address) as it:
        with pytest.raises(MasterUnavailable):
            it.lookup([b"k"], DEADLINE)
        assert it.lookup([b"k"], DEADLINE) == [True]


def test_a_connection_that_ended_while_it_was_idle_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def ends(end: RawServerEnd) -> None:
        end.welcome()
        end.socket.close()
        ended.set()

    monkeypatch.setattr("umbp_connectors.client.native_blocking._FRESH", 0.0)
    with FakeMaster(tmp_path / "s", ends, found) as fake, client(fake.address) as it:
        it.open(DEADLINE)
        assert ended.wait(DEADLINE)
        assert it.lookup([b"k"], DEADLINE) == [True]


def test_nobody_is_there(tmp_path: Path) -> None:
    for address in (str(tmp_path / "nothing"), ("127.0.0.1", 1)):
        with client(address) as it, pytest.raises(MasterUnavailable, match="is not reached"):
            it.open(DEADLINE)


def test_an_ipv6_address_has_brackets() -> None:
    with client(("::1", 1)) as it, pytest.raises(MasterUnavailable, match=r"the master at \[::1\]:1 is not reached"):
        it.open(DEADLINE)


def test_no_time_is_no_answer(blocking: NativeBlockingClient) -> None:
    with pytest.raises(MasterUnavailable):
        blocking.lookup([b"k"], 0.0)
    assert blocking.lookup([b"k"], DEADLINE) == [False]


def test_threads_run_beside_each_other_and_wait_for_a_connection(blocking: NativeBlockingClient) -> None:
    nodes = {f"node-{number}": hashes_of(*range(number * 20, number * 20 + 50)) for number in range(12)}
    wrong: list[object] = []

    def work(node: str, hashes: list[bytes]) -> None:
        blocking.register(Registration(node), DEADLINE)
        for _ in range(50):
            blocking.report(node, hashes, DRAM, DEADLINE)
            held = {match.node_id: match.tiers for match in blocking.match(hashes, False, DEADLINE)}
            if held[node] != {DRAM: hashes}:
                wrong.append(held)
            blocking.revoke(node, hashes[:25], DRAM, DEADLINE)
            held = {match.node_id: match.tiers for match in blocking.match(hashes, False, DEADLINE)}
            if held[node] != {DRAM: hashes[25:]}:
                wrong.append(held)

    threads = [threading.Thread(target=work, args=pair) for pair in nodes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert len(blocking.list_nodes(DEADLINE)) == len(nodes)


def asked_in_a_thread(it: NativeBlockingClient) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that asks, and what it gets."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            it.lookup([b"k"], DEADLINE)
        except MasterError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, raised


def test_a_thread_that_gets_no_connection_gives_up_in_time(tmp_path: Path) -> None:
    asked = threading.Event()

    def asked_and_silent(end: RawServerEnd) -> None:
        end.welcome()
        end.receive()
        asked.set()
        end.until_closed()

    with FakeMaster(tmp_path / "s", asked_and_silent) as fake, client(fake.address, connections=1) as it:
        thread, raised = asked_in_a_thread(it)
        assert asked.wait(DEADLINE)
        with pytest.raises(MasterUnavailable, match="all 1 connections"):
            it.lookup([b"k"], SHORT)
        it.close()
        thread.join(DEADLINE)
        assert [type(error) for error in raised] == [MasterUnavailable]


@pytest.mark.parametrize("greets", [True, False])
def test_close_ends_calls_of_other_threads(tmp_path: Path, greets: bool) -> None:
    asked = threading.Event()

    def silent_now(end: RawServerEnd) -> None:
        if greets:
            end.welcome()
        end.receive()
        asked.set()
        end.until_closed()

    with FakeMaster(tmp_path / "s", silent_now) as fake, client(fake.address) as it:
        thread, raised = asked_in_a_thread(it)
        assert asked.wait(DEADLINE)
        it.close()
        thread.join(DEADLINE)
        assert not thread.is_alive()
        assert [type(error) for error in raised] == [MasterUnavailable]
        with pytest.raises(MasterUnavailable, match="is closed"):
            it.lookup([b"k"], DEADLINE)
        it.close()


def test_the_token_is_needed(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "locked"
    running.serve(path, token=b"secret")
    for token in (b"", b"wrong", b"secret "):
        with client(str(path), identity=Identity(token=token)) as it, pytest.raises(AccessDenied, match="token"):
            it.open(DEADLINE)
    with client(str(path), identity=Identity(token=b"secret")) as it:
        assert it.list_nodes(DEADLINE) == []


def test_what_is_too_large_is_not_sent(blocking: NativeBlockingClient) -> None:
    with pytest.raises(InvalidRequest, match="split it"):
        blocking.lookup([bytes(bounds.HASH_BYTES)] * 300, DEADLINE)
    with pytest.raises(InvalidRequest, match="above the bound"):
        blocking.lookup([b""] * (bounds.HASHES + 1), DEADLINE)
    with pytest.raises(InvalidRequest, match="bits on the wire"):
        blocking.route_put("n", [b"k"], [-1], [], DEADLINE)
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        blocking.probe("n", 1 << 64, 0, DEADLINE)
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        blocking.clear_node("\ud800", DEADLINE)
    with pytest.raises(InvalidRequest, match="9223372036854775807"):
        blocking.probe("n", 1 << 63, 0, DEADLINE)
    assert blocking.lookup([b"k"], DEADLINE) == [False]


def test_an_answer_that_the_client_does_not_take_is_not_sent(path: str) -> None:
    hashes = hashes_of(*range(2000))
    with client(path, identity=Identity(max_frame=4096)) as it:
        it.register(Registration("n"), DEADLINE)
        it.report("n", hashes, DRAM, DEADLINE)
        with pytest.raises(InvalidRequest, match="ask for less"):
            it.list_blocks("n", DRAM, 0, 2000, DEADLINE)
        assert len(it.list_blocks("n", DRAM, 0, 200, DEADLINE).hashes) == 200
