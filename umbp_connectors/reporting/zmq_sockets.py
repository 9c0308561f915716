"""The sockets of an engine's event stream: a subscription, its monitor, and replays.

What is said on them is made sense of elsewhere.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from umbp_connectors.reporting.zmq_sequence import Event
from umbp_core.errors import ConfigError

_BURST = 256
"""Batches that are read at one go."""
_WAITING = 10_000
"""Batches that may wait in a socket; the publisher drops what is beyond."""
_MAX_BATCH_BYTES = 1 << 26
_HEARTBEAT_MS, _SILENCE_MS = 2000, 6000
"""A host that vanished says nothing: it is asked, and given up."""
_RECONNECT_MS, _RECONNECT_MAX_MS = 100, 2000
_END = b"\xff" * 8
"""The number of the batch that ends a replay."""
_NUMBER_BYTES = 8
_GREETED = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_GONE = int(zmq.EVENT_DISCONNECTED)
_STRANGE = int(
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""Comes right before the end of a connection that was never greeted: of a port scanner, or a probe of health."""


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """Where an engine publishes.  Without ``replay`` it cannot be asked again."""

    endpoint: str
    replay: str = ""
    topic: str = ""
    bind: bool = False
    """The engine connects to us, which it does when its endpoint names a host."""


class Happening(NamedTuple):
    """What a socket told; ``number`` and ``payload`` are those of a batch."""

    event: Event
    number: int = -1
    payload: bytes = b""
    round: int = 0
    """The replay that it belongs to; 0 for the stream."""


class EngineStream:
    """The stream of one engine.  One thread at a time, but for :meth:`wake`.

    The constructor does nothing; :meth:`open` opens the sockets.
    """

    def __init__(self, settings: StreamSettings) -> None:
        self.settings = settings
        self.garbled = 0
        """Messages that are no batches."""
        self.round = 0
        """The number of the replay that is under way."""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._live: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._replay: zmq.Socket[bytes] | None = None
        self._bell: tuple[socket.socket, socket.socket] | None = None
        self._engines = 0
        """Connections that were greeted: several where we listen, and one that is not given up yet has a successor."""
        self._strangers = 0

    def open(self) -> None:
        """Subscribe.  Raises ``ConfigError`` when the endpoint cannot be used."""
        self._bell = socket.socketpair()
        for end in self._bell:
            end.setblocking(False)
        context = self._context = zmq.Context()
        live = self._live = context.socket(zmq.SUB)
        self._configure(live)
        live.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        live.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        live.setsockopt(zmq.SUBSCRIBE, self.settings.topic.encode())
        self._monitor = live.get_monitor_socket(_GREETED | _GONE | _STRANGE)
        place = live.bind if self.settings.bind else live.connect
        try:
            place(self.settings.endpoint)
        except zmq.ZMQError as error:
            self.close()
            what = "bound" if self.settings.bind else "used"
            raise ConfigError(f"the endpoint {self.settings.endpoint!r} cannot be {what}: {error}") from error

    def wake(self) -> None:
        """Let :meth:`wait` return.  Any thread."""
        bell = self._bell
        try:
            if bell is not None:
                bell[0].send(b"x")
        except OSError:
            return  # it rings already, or it is closed

    def wait(self, timeout: float) -> list[Happening]:
        """What happened, after ``timeout`` seconds at most; a lost connection comes before what came over it.

        What came before a connection was lost is dropped: whether it is from the engine that is there now, nobody
        can tell.
        """
        live, monitor, bell = self._live, self._monitor, self._bell
        if live is None or monitor is None or bell is None:
            return []
        poller = zmq.Poller()
        for each in filter(None, (live, monitor, self._replay)):
            poller.register(each, zmq.POLLIN)
        poller.register(bell[1].fileno(), zmq.POLLIN)
        poller.poll(math.ceil(max(0.0, timeout) * 1000))
        _silence(bell[1])
        batches = list(self._read_live(live, _BURST))
        turns = list(self._read_monitor(monitor))
        if any(each.event is Event.DISCONNECTED for each in turns):
            batches = []
            for _ in self._read_live(live, _WAITING):
                pass
        return [*turns, *batches, *self._read_replay()]

    def ask(self, start: int) -> None:
        """Begin a replay from ``start`` on, in the place of the one that is under way."""
        self.end_replay()
        if self._context is None:
            return
        replay = self._replay = self._context.socket(zmq.DEALER)
        self._configure(replay)
        self.round += 1
        replay.connect(self.settings.replay)
        replay.send_multipart([b"", start.to_bytes(_NUMBER_BYTES, "big")], zmq.NOBLOCK)

    def end_replay(self) -> None:
        """What is left of a replay is not wanted."""
        if self._replay is not None:
            self._replay.close(linger=0)
            self._replay = None

    def close(self) -> None:
        """Close everything.  Idempotent."""
        self.end_replay()
        if self._live is not None:
            self._live.disable_monitor()
        if self._monitor is not None:
            self._monitor.close(linger=0)
        if self._live is not None:
            self._live.close(linger=0)
        if self._context is not None:
            self._context.term()
        for end in self._bell or ():
            end.close()
        self._live = self._monitor = self._context = self._bell = None

    def _read_live(self, live: zmq.Socket[bytes], most: int) -> Iterator[Happening]:
        for _ in range(most):
            try:
                frames = live.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 3 and len(frames[1]) == _NUMBER_BYTES:
                yield Happening(Event.LIVE, int.from_bytes(frames[1], "big"), frames[2])
            else:
                self.garbled += 1

    def _read_replay(self) -> Iterator[Happening]:
        """Newer engines say the topic too; number and batch come last in all of them."""
        for _ in range(_BURST):
            if self._replay is None:
                return
            try:
                *_, number, payload = [b"", b"", *self._replay.recv_multipart(zmq.NOBLOCK)]
            except zmq.Again:
                return
            if len(number) != _NUMBER_BYTES:
                self.garbled += 1
            elif number == _END:
                self.end_replay()
                yield Happening(Event.ENDED, round=self.round)
            else:
                yield Happening(Event.REPLAYED, int.from_bytes(number, "big"), payload, self.round)

    def _read_monitor(self, monitor: zmq.Socket[bytes]) -> Iterator[Happening]:
        """Turns of engines; that a connection ends which was never greeted, or is not the last one, is none."""
        while monitor.poll(0):
            event = int(recv_monitor_message(monitor)["event"])
            if event == _GREETED:
                self._engines += 1
                yield Happening(Event.CONNECTED)
            elif event != _GONE:
                self._strangers += 1
            elif self._strangers:
                self._strangers -= 1
            else:
                self._engines = max(0, self._engines - 1)
                if not self._engines:
                    yield Happening(Event.DISCONNECTED)

    @staticmethod
    def _configure(each: zmq.Socket[bytes]) -> None:
        options = {
            zmq.LINGER: 0,
            zmq.IPV6: 1,
            zmq.RCVHWM: _WAITING,
            zmq.MAXMSGSIZE: _MAX_BATCH_BYTES,
            zmq.HEARTBEAT_IVL: _HEARTBEAT_MS,
            zmq.HEARTBEAT_TIMEOUT: _SILENCE_MS,
            zmq.TCP_KEEPALIVE: 1,
        }
        for option, value in options.items():
            each.setsockopt(option, value)


def _silence(bell: socket.socket) -> None:
    try:
        bell.recv(64)
    except BlockingIOError:
        return  # it did not ring
