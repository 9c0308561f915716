"""A ``vllm serve`` subprocess and a client for it that measures: what the demo, benchmarks and tests share.

Standard library only; the Python that runs vLLM may be another one than the Python that imports this.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

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


@final
@dataclass
class VllmServer:
    """``vllm serve`` on a free port of this machine; use as a context manager.

    ``arguments`` go behind ``vllm serve MODEL``; ``environment`` is added to this process's.  The log goes to
    ``log``, which is appended to, so that the log of a second start of the same server follows the first.
    """

    model: Path
    log: Path
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable
    start_timeout: float = 300.0
    stop_timeout: float = 60.0
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return when it answers; raises ``ServerFailed`` when it does not in time."""
        self.port = _free_port()
        command = [self.python, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", MODEL_NAME]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # one group of processes, so that none is left behind
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

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

    def complete(self, prompt: Sequence[int], max_tokens: int = 16, **settings: Any) -> Answer:
        """Complete ``prompt`` (token ids) greedily; ``settings`` are further fields of the request."""
        body = {
            "model": MODEL_NAME,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "logprobs": 5,
            **settings,
        }
        tokens: list[int] = []
        choices: list[dict[int, float]] = []
        first = 0.0
        cached = 0
        begin = time.perf_counter()
        for event in self._events("/v1/completions", body):
            for choice in event.get("choices", ()):
                if choice.get("token_ids"):
                    first = first or time.perf_counter() - begin
                    tokens += choice["token_ids"]
                    choices += map(_candidates, choice["logprobs"]["top_logprobs"])
            details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens") or cached
        return Answer(tuple(tokens), tuple(choices), first, time.perf_counter() - begin, cached)

    def reset_prefix_cache(self, timeout: float = 60.0) -> None:
        """Empty the engine's own prefix cache, not the pool.

        vLLM refuses as long as a block is in use; a store in flight is a use, so that this also waits until what
        was computed is in the pool.  Raises ``TimeoutError``.
        """
        deadline = time.monotonic() + timeout
        while not self.post("/reset_prefix_cache").get("success"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"blocks of the prefix cache are still in use after {timeout:g} s; see {self.log}")
            time.sleep(0.05)

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
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return _checked(path, response, response.read())

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer to a POST; raises ``ServerFailed`` unless the status is 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body or {}), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return json.loads(_checked(path, response, response.read()))

    def log_tail(self, lines: int = 40) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                _checked(path, response, response.read())
            for line in response:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[len(b"data: ") :])

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while True:
            if self.process is None or self.process.poll() is not None:
                raise ServerFailed(f"vllm serve ended before it was ready; the end of {self.log}:\n{self.log_tail()}")
            with contextlib.suppress(OSError, ServerFailed):
                self.get("/health")
                return
            if time.monotonic() > deadline:
                waited = f"vllm serve was not ready after {self.start_timeout:g} s"
                raise ServerFailed(f"{waited}; the end of {self.log}:\n{self.log_tail()}")
            time.sleep(0.25)


def cpu_environment(kv_cache_gib: int = 1) -> dict[str, str]:
    """What a CPU engine on a small machine should be started with; what the user has set stays.

    More than one OpenMP thread on a machine that is not idle spins more than it computes.
    """
    wanted = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def cpu_only() -> bool:
    """Whether the vLLM of this Python runs on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _candidates(logprobs: Mapping[str, float]) -> dict[int, float]:
    return {int(name.removeprefix("token_id:")): value for name, value in logprobs.items()}


def _checked(path: str, response: http.client.HTTPResponse, body: bytes) -> bytes:
    if response.status != http.HTTPStatus.OK:
        raise ServerFailed(
            f"{path} answered {response.status} {response.reason}: {body[:2000].decode(errors='replace')}"
        )
    return body


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
