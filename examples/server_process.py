"""An engine's HTTP server as a subprocess, whatever the engine: start, stop, ask, and read its metrics.

Standard library only; the Python that runs the engine may be another one than the Python that imports this.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

MODEL_NAME = "random"
"""The name under which every server here serves its model."""

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class ServerFailed(RuntimeError):
    """The server ended, or did not become ready in time; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion: its greedy tokens, how long the first took, and how much of the prompt was not computed.

    ``choices`` holds, per token, the log-probabilities of the best few candidates.
    """

    tokens: tuple[int, ...]
    choices: tuple[dict[int, float], ...]
    seconds_to_first_token: float
    seconds: float
    cached_tokens: int

    def agrees(self, other: Answer, tie: float = 0.0) -> bool:
        """Whether both have the same tokens, up to the first one that was a tie within ``tie`` nats.

        Two ways to compute the same attention (in one chunk, or its last token only) round differently; in 16-bit
        arithmetic that decides between two candidates that are as good as equal, and from there on the texts differ.
        """
        for mine, theirs, candidates in zip(self.tokens, other.tokens, self.choices, strict=False):
            if mine != theirs:
                return candidates.get(theirs, -math.inf) >= candidates[mine] - tie
        return len(self.tokens) == len(other.tokens)


@dataclass
class EngineServer(ABC):
    """An engine that serves ``model`` on a free port of this machine; use as a context manager.

    ``arguments`` go behind the command; ``environment`` is added to this process's.  The log goes to ``log``, which is
    appended to, so that the log of a second start of the same server follows the first.
    """

    READY: ClassVar[str] = "/health"
    """What answers with 200 from the moment on when it serves."""

    model: Path
    log: Path
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable
    start_timeout: float = 300.0
    stop_timeout: float = 60.0
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What serves the model on :attr:`port`, without :attr:`arguments`."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return when it answers; raises ``ServerFailed`` when it does not in time."""
        self.port = free_port()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command(), *self.arguments],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # one group of processes, so that none is left behind
            )
        with contextlib.ExitStack() as failed:
            failed.callback(self.kill)
            self._wait_until_ready()
            failed.pop_all()

    def stop(self) -> None:
        """Ask the server to end, as an operator would, and wait; what does not end in time is killed."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.stop_timeout)
        self.kill()

    def kill(self) -> None:
        """SIGKILL for every process of the server, engine and workers included."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def wait_for_metric(self, name: str, at_least: float, timeout: float = 60.0, **labels: str) -> float:
        """Wait until a metric reaches ``at_least``; returns its value.  Raises ``TimeoutError``."""
        deadline = time.monotonic() + timeout
        while (value := self.metric(name, **labels)) < at_least:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}{labels or ''} is {value:g} after {timeout:g} s, wanted {at_least:g}")
            time.sleep(0.1)
        return value

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples called ``name`` (with or without ``_total``) that carry ``labels``."""
        names = {name, f"{name}_total"}
        return sum(
            value
            for sample, sample_labels, value in self.metrics()
            if sample in names and labels.items() <= sample_labels.items()
        )

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """Every sample of ``/metrics``: name, labels, value."""
        samples = []
        for line in self.get("/metrics").decode().splitlines():
            match = _SAMPLE.match(line)
            if match:
                labels = dict(_LABEL.findall(match["labels"] or ""))
                samples.append((match["name"], labels, float(match["value"])))
        return samples

    def get(self, path: str) -> bytes:
        """The body of a GET; raises ``ServerFailed`` unless the status is 200."""
        return self.request("GET", path, timeout=30)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer to a POST; raises ``ServerFailed`` unless the status is 200."""
        return json.loads(self.request("POST", path, body or {}))

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 300.0,
    ) -> bytes:
        """The body of any answer; raises ``ServerFailed`` unless the status is 200."""
        with self._asked(method, path, body, headers, timeout) as response:
            return response.read()

    def log_tail(self, lines: int = 40) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events of a POST, as they come; raises ``ServerFailed`` unless the status is 200."""
        with self.stream(path, body) as (_, events):
            yield from events

    @contextlib.contextmanager
    def stream(
        self, path: str, body: Mapping[str, Any]
    ) -> Iterator[tuple[http.client.HTTPMessage, Iterator[dict[str, Any]]]]:
        """The headers and the server-sent events of a POST; raises ``ServerFailed`` unless the status is 200."""
        with self._asked("POST", path, body, None, 300.0) as response:
            yield response.headers, map(json.loads, filter(None, map(_event, response)))

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None, timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            content = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), {**content, **(headers or {})})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                text = response.read()[:2000].decode(errors="replace")
                raise ServerFailed(f"{path} answered {response.status} {response.reason}: {text}")
            yield response

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while True:
            if self.process is None or self.process.poll() is not None:
                raise ServerFailed(f"the server ended before it was ready; the end of {self.log}:\n{self.log_tail()}")
            with contextlib.suppress(OSError, ServerFailed):
                self.get(self.READY)
                return
            if time.monotonic() > deadline:
                waited = f"the server was not ready after {self.start_timeout:g} s"
                raise ServerFailed(f"{waited}; the end of {self.log}:\n{self.log_tail()}")
            time.sleep(0.25)


def _event(line: bytes) -> bytes:
    """What a line of a stream of events says; empty when that is nothing."""
    data = line.removeprefix(b"data: ")
    return b"" if data is line or data.startswith(b"[DONE]") else data


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now.

    Below those that the system gives to connections: one of them would take it before the server does.
    """
    for port in random.sample(range(10_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise OSError("none of a hundred TCP ports is free")
