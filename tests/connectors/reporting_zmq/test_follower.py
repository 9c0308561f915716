"""A follower between a publisher and a real master: whatever is lost, the master never knows of what may be gone."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.connectors.reporting.at_master import DRAM, HBM, SSD, Held, known_at
from tests.connectors.reporting_zmq.publisher import CLEARED, Publisher, batch, removed, stored
from tests.connectors.waiting import eventually
from tests.master.app.master_process import MasterProcess
from umbp_connectors.config import resolve
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.zmq_follower import Follower, FollowerStats, Patience
from umbp_connectors.reporting.zmq_sockets import EngineStream, StreamSettings
from umbp_core.errors import ConfigError

DEADLINE = 60.0
QUICK = Patience(grace=0.3, idle=0.3, replay=10.0)
"""For engines that answer whatever they are asked, though perhaps late."""


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MasterProcess]:
    with MasterProcess(tmp_path_factory.mktemp("follow")) as running:
        yield running
        assert running.end() == 0


class Following:
    """A follower in a thread, and what the master knows by it."""

    def __init__(self, master: MasterProcess, node: str, settings: StreamSettings, patience: Patience = QUICK) -> None:
        config = resolve({"master_address": f"umbp://{master.doors['native']}", "node_id": node}, {}).config
        reporter = open_reporter(config, NodeFacts("vllm", "tiny", "1", "both", "127.0.0.1", 8000))
        assert reporter is not None
        self.reporter: Reporter = reporter
        self.follower = Follower(EngineStream(settings), reporter, patience)
        self._master, self._node = master, node
        self._thread = threading.Thread(target=self.follower.run, name="follower")

    def __enter__(self) -> Following:
        self.reporter.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.follower.stop()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        assert self.reporter.close(DEADLINE)

    @property
    def stats(self) -> FollowerStats:
        return self.follower.stats()

    def known(self) -> Held:
        assert self.reporter.flush(DEADLINE)
        return known_at(self._master, self._node)

    def comes_to(self, expected: int | None, state: str = "steady") -> None:
        """Wait until the follower has seen all batches before ``expected``."""
        assert eventually(lambda: (self.stats.state, self.stats.expected) == (state, expected)), self.stats


def settings_of(publisher: Publisher, **fields: Any) -> StreamSettings:
    return replace(StreamSettings(publisher.endpoint, publisher.replay), **fields)


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def follow(master: MasterProcess, cleanup: ExitStack, request: pytest.FixtureRequest) -> Callable[..., Following]:
    def start(publisher: Publisher, patience: Patience = QUICK, **fields: Any) -> Following:
        settings = settings_of(publisher, **fields)
        return cleanup.enter_context(Following(master, request.node.name, settings, patience))

    return start


def test_what_an_engine_publishes_is_what_the_master_knows(
    cleanup: ExitStack, follow: Callable[..., Following]
) -> None:
    engine = cleanup.enter_context(Publisher())
    engine.publish(stored(-1, 2))  # before anybody listens
    engine.publish(stored(b"\x0a", medium="CPU"), removed(2))
    following = follow(engine)
    following.comes_to(2)
    assert following.known() == {HBM: {b"-1"}, DRAM: {b"0a"}}
    engine.publish(stored(7, medium="STORAGE"), stored(8, medium="EXTERNAL"))
    engine.publish(["BlockStored", [9], None, [1], 16, None, "GPU"], {"type": "Other"})
    following.comes_to(4)
    assert following.known() == {HBM: {b"-1", b"9"}, DRAM: {b"0a"}, SSD: {b"7"}}
    engine.publish(CLEARED, removed(-1, 9))
    following.comes_to(5)
    assert following.known() == {SSD: {b"7"}}
    stats = following.stats
    assert (stats.applied, stats.missed, stats.elsewhere, stats.unknown, stats.cleared) == (5, 0, 1, 1, {})
    assert stats.absent == 2


@pytest.mark.statement("connector", 91)
def test_batches_that_were_lost_are_replayed(cleanup: ExitStack, follow: Callable[..., Following]) -> None:
    engine = cleanup.enter_context(Publisher())
    following = follow(engine)
    following.comes_to(0)
    for number in range(50):
        engine.publish(stored(number), lost=number % 7 == 3 or 20 < number < 30)
    engine.publish(removed(3, 25), lost=True)
    engine.publish(stored(99))
    following.comes_to(52)
    assert following.known() == {HBM: {b"%d" % n for n in [*range(50), 99] if n not in (3, 25)}}
    assert following.stats.cleared == {}
    assert following.stats.missed == 0


@pytest.mark.statement("connector", 91)
def test_the_end_of_a_burst_that_was_lost_is_asked_for(cleanup: ExitStack, follow: Callable[..., Following]) -> None:
    """Nothing comes after it that would show the gap."""
    engine = cleanup.enter_context(Publisher())
    following = follow(engine)
    engine.publish(stored(1, 2))
    following.comes_to(1)
    engine.publish(removed(1), lost=True)
    following.comes_to(2)
    assert following.known() == {HBM: {b"2"}}


def test_a_gap_that_nobody_can_fill_clears_what_may_be_gone(
    cleanup: ExitStack, follow: Callable[..., Following]
) -> None:
    forgetful = cleanup.enter_context(Publisher(keeps=2))
    following = follow(forgetful, replace(QUICK, idle=DEADLINE))
    following.comes_to(0)
    forgetful.publish(stored(1, 2), stored(3, medium="DISK"))
    following.comes_to(1)
    for number in range(4):
        forgetful.publish(removed(1), stored(10 + number), lost=True)
    forgetful.publish(stored(20))
    following.comes_to(6)
    assert following.known() == {HBM: {b"13", b"20"}}
    assert following.stats.cleared == {"gap": 1}
    assert following.stats.missed == 3


@pytest.mark.parametrize("dead", [False, True], ids=["no replay", "a replay that never answers"])
def test_without_a_replay_a_gap_clears(cleanup: ExitStack, follow: Callable[..., Following], dead: bool) -> None:
    engine = cleanup.enter_context(Publisher(answer=lambda _: None) if dead else Publisher(replays=False))
    following = follow(engine, replace(QUICK, replay=0.5))
    following.comes_to(None)
    assert eventually(lambda: bool(engine.publish(stored(1, 2)) >= 0 and following.stats.applied))
    engine.publish(removed(1), lost=True)
    last = engine.publish(stored(5))
    following.comes_to(last + 1)
    assert following.known() == {HBM: {b"5"}}
    assert following.stats.cleared == {"gap": 1}


def test_a_replay_with_holes_is_asked_for_again(cleanup: ExitStack, follow: Callable[..., Following]) -> None:
    """A ROUTER drops what there is no room for, and says nothing."""

    def with_holes(batches: Sequence[tuple[int, bytes]]) -> Sequence[tuple[int, bytes]]:
        return [each for at, each in enumerate(batches) if at % 5 != 4]

    engine = cleanup.enter_context(Publisher(answer=with_holes))
    for number in range(23):
        engine.publish(stored(number), removed(number - 10))
    following = follow(engine)
    following.comes_to(23)
    assert following.known() == {HBM: {b"%d" % number for number in range(13, 23)}}
    assert (following.stats.cleared, following.stats.missed) == ({}, 0)
    assert following.stats.replays > 3


def test_a_long_replay_is_whole(cleanup: ExitStack, follow: Callable[..., Following]) -> None:
    """As much as an engine keeps, over sockets with the room that an engine gives them: a ROUTER drops some of it."""
    engine = cleanup.enter_context(Publisher())
    tokens = list(range(600))
    for number in range(10_000):
        engine.publish(stored(number) | {"token_ids": tokens})
    following = follow(engine, replace(QUICK, replay=2.0))
    following.comes_to(10_000)
    assert following.known() == {HBM: {b"%d" % number for number in range(10_000)}}
    assert (following.stats.cleared, following.stats.missed) == ({}, 0)


def test_an_engine_that_was_restarted_has_what_its_new_life_says(
    cleanup: ExitStack, follow: Callable[..., Following]
) -> None:
    """Even where the new life has reached the very number that we expect."""
    old = Publisher()
    endpoint, replay = old.endpoint, old.replay
    for number in range(3):
        old.publish(stored(number))
    following = follow(old, replace(QUICK, grace=DEADLINE))
    following.comes_to(3)
    assert following.known() == {HBM: {b"0", b"1", b"2"}}
    old.close()
    assert eventually(lambda: following.stats.state == "away")
    assert following.known() == {HBM: {b"0", b"1", b"2"}}, "it may be back in a moment"
    new = Publisher(endpoint, replay)
    cleanup.enter_context(new)
    for number in range(3):
        new.publish(stored(100 + number))
    following.comes_to(3)
    assert following.known() == {HBM: {b"100", b"101", b"102"}}
    assert following.stats.cleared == {"restart": 1}
    assert following.stats.restarts == 1


def test_a_lost_connection_costs_nothing_when_the_engine_repeats_itself(
    tmp_path: Path, cleanup: ExitStack, follow: Callable[..., Following]
) -> None:
    engine = cleanup.enter_context(Publisher())
    relay = cleanup.enter_context(Relay(engine))
    following = follow(engine, replace(QUICK, grace=DEADLINE), endpoint=relay.endpoint)
    engine.publish(stored(1, 2))
    following.comes_to(1)
    relay.cut()
    assert eventually(lambda: following.stats.state == "away")
    engine.publish(removed(1), stored(3))
    relay.mend()
    following.comes_to(2)
    assert following.known() == {HBM: {b"2", b"3"}}
    assert following.stats.cleared == {}


def test_an_engine_that_stays_away_counts_as_empty(cleanup: ExitStack, follow: Callable[..., Following]) -> None:
    engine = Publisher()
    engine.publish(stored(1), stored(2, medium="DISK"))
    following = follow(engine)
    following.comes_to(1)
    engine.close()
    assert eventually(lambda: following.stats.cleared == {"gone": 1})
    assert following.known() == {}


def test_an_engine_that_stays_away_behind_something_that_answers_counts_as_empty(
    cleanup: ExitStack, follow: Callable[..., Following]
) -> None:
    """A sidecar or a load balancer takes each connection, and ends it."""
    engine = cleanup.enter_context(Publisher())
    relay = cleanup.enter_context(Relay(engine))
    following = follow(engine, endpoint=relay.endpoint)
    engine.publish(stored(1))
    following.comes_to(1)
    relay.cut()
    assert eventually(lambda: following.stats.cleared == {"gone": 1})
    assert following.known() == {}


def test_without_a_replay_a_lost_connection_clears_at_once(
    cleanup: ExitStack, follow: Callable[..., Following]
) -> None:
    engine = Publisher(replays=False)
    following = follow(engine, replace(QUICK, grace=DEADLINE))
    assert eventually(lambda: bool(engine.publish(stored(1)) >= 0 and following.stats.applied))
    engine.close()
    assert eventually(lambda: following.stats.cleared == {"unproven": 1})
    assert following.known() == {}


def test_a_batch_that_is_not_understood_may_have_said_anything(
    cleanup: ExitStack, follow: Callable[..., Following]
) -> None:
    engine = cleanup.enter_context(Publisher())
    following = follow(engine)
    engine.publish(stored(1))
    engine.publish(raw=b"\xc1")
    engine.publish(stored(2))
    following.comes_to(3)
    assert following.known() == {HBM: {b"2"}}
    assert (following.stats.garbled, following.stats.cleared) == (1, {"garbled": 1})


@pytest.mark.parametrize("frames", [(b"", b"too", b"many", b"frames"), (b"few",), (b"", b"short", b"payload")])
def test_messages_that_are_no_batches_are_counted(
    cleanup: ExitStack, follow: Callable[..., Following], frames: tuple[bytes, ...]
) -> None:
    engine = cleanup.enter_context(Publisher())
    following = follow(engine)
    following.comes_to(0)

    def seen() -> bool:
        engine.send(*frames)
        return following.stats.garbled > 0

    assert eventually(seen)
    engine.publish(stored(1))
    following.comes_to(1)
    assert following.known() == {HBM: {b"1"}}


def test_events_that_are_not_known_are_named_once(
    cleanup: ExitStack, follow: Callable[..., Following], caplog: pytest.LogCaptureFixture
) -> None:
    engine = cleanup.enter_context(Publisher())
    for number in range(40):
        engine.publish({"type": f"New{number % 30}"}, stored(number))
    following = follow(engine)
    following.comes_to(40)
    assert following.stats.unknown == 40
    assert len(following.known()[HBM]) == 40
    assert sum("is not known here" in record.getMessage() for record in caplog.records) == 16


def free_port() -> int:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    probe = context.socket(zmq.SUB)
    port = probe.bind_to_random_port("tcp://127.0.0.1")
    probe.close(linger=0)
    context.destroy(linger=0)
    return port


def test_a_strangers_connection_is_not_the_engines(cleanup: ExitStack, follow: Callable[..., Following]) -> None:
    """A probe of health, or a scanner: it takes the port, says nothing and goes."""
    port = free_port()
    engine = cleanup.enter_context(Publisher(f"tcp://127.0.0.1:{port}", connect=True, replays=False))
    following = follow(engine, endpoint=f"tcp://127.0.0.1:{port}", bind=True)
    assert eventually(lambda: bool(engine.publish(stored(1)) >= 0 and following.stats.applied))
    for number in range(3):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * number)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(1 << 10):  # until the other side has let it go
                pass
    engine.publish(stored(2))
    assert eventually(lambda: following.known() == {HBM: {b"1", b"2"}})
    assert (following.stats.state, following.stats.cleared) == ("steady", {})


def test_topics_and_engines_that_connect(cleanup: ExitStack, follow: Callable[..., Following]) -> None:
    port = free_port()
    engine = cleanup.enter_context(Publisher(f"tcp://127.0.0.1:{port}", connect=True, topic=b"kv@a"))
    engine.publish(stored(1), lost=True)
    following = follow(engine, endpoint=f"tcp://127.0.0.1:{port}", bind=True, topic="kv@")
    following.comes_to(1)
    engine.publish(stored(2))
    following.comes_to(2)
    engine.send(b"other", (2).to_bytes(8, "big"), batch(stored(3)))
    engine.publish(stored(4))
    following.comes_to(3)
    assert following.known() == {HBM: {b"1", b"2", b"4"}}


def test_an_endpoint_that_cannot_be_used_is_said(cleanup: ExitStack, master: MasterProcess) -> None:
    engine = cleanup.enter_context(Publisher(replays=False))
    following = Following(master, "n", settings_of(engine, bind=True))
    with pytest.raises(ConfigError, match="cannot be bound"):
        following.follower.run()
    following.reporter.close()


class Relay:
    """Between a subscriber and a publisher; its connections can be cut."""

    def __init__(self, publisher: Publisher) -> None:
        host, _, port = publisher.endpoint.removeprefix("tcp://").rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._whole = True
        self._threads = [threading.Thread(target=self._accept, name="relay", daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        _shut(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(DEADLINE)

    def cut(self) -> None:
        """End every connection, and let no other one come about."""
        with self._lock:
            self._whole = False
            for each in self._open:
                _shut(each)
            self._open.clear()

    def mend(self) -> None:
        with self._lock:
            self._whole = True

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if not self._whole:
                    near.close()
                    continue
                far = socket.create_connection(self._target, timeout=DEADLINE)
                far.settimeout(None)
                self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=_pump, args=(source, sink), daemon=True)
                self._threads.append(thread)
                thread.start()


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        return
