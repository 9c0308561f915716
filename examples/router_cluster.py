"""A master, two vLLM servers that report to it, and the router in front: what demo, tests and benchmark share.

Standard library only, as :mod:`examples.server_process`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from examples.server_process import MODEL_NAME, EngineServer, free_port
from examples.serving import VllmServer

ROOT = Path(__file__).resolve().parents[1]


@final
@dataclass
class MasterServer(EngineServer):
    """``umbp master`` on free ports; ``model`` is of no use to it."""

    READY: ClassVar[str] = "/readyz"

    native_port: int = 0

    def command(self) -> list[str]:
        """The native protocol and metrics, nothing else, and nothing remembered."""
        self.native_port = self.native_port or free_port()
        main = "from umbp_connectors.cli import main; main()"
        listen = [f"--native-listen=127.0.0.1:{self.native_port}", f"--metrics-listen=127.0.0.1:{self.port}"]
        return [self.python, "-c", main, "master", "--listen=none", "--state-dir=none", *listen]

    @property
    def address(self) -> str:
        """For ``--master`` and ``UMBP_MASTER_ADDRESS``."""
        return f"umbp://127.0.0.1:{self.native_port}"


@dataclass(frozen=True, slots=True)
class Routed:
    """An answer through a router: who gave it, why it was asked, and what it took.  Seconds are from the request on."""

    worker: str
    why: str
    seconds_to_first_token: float
    prompt_tokens: int
    cached_tokens: int
    text: str


@final
@dataclass
class RouterServer(EngineServer):
    """``python -m examples.router``; ``model`` is of no use to it."""

    def command(self) -> list[str]:
        """On the free port that was chosen."""
        return [self.python, "-m", "examples.router", "--port", str(self.port)]

    def complete(self, prompt: Sequence[int] | str, max_tokens: int = 8, **settings: Any) -> Routed:
        """Complete ``prompt`` greedily, as a stream."""
        body = {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **settings,
        }
        begin, first = time.perf_counter(), 0.0
        text, usage = "", {}
        with self.stream("/v1/completions", body) as (headers, events):
            for event in events:
                for choice in event.get("choices", ()):
                    first = first or time.perf_counter() - begin
                    text += choice["text"]
                usage = event.get("usage") or usage
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        worker, why = headers["x-umbp-worker"], headers["x-umbp-why"]
        return Routed(worker, why, first, usage.get("prompt_tokens", 0), cached, text)


@dataclass
class Cluster:
    """What runs."""

    master: MasterServer
    workers: list[VllmServer]
    router: RouterServer


@contextlib.contextmanager
def cluster(
    model: Path,
    folder: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    router_arguments: Sequence[str] = (),
    count: int = 2,
) -> Iterator[Cluster]:
    """``count`` servers of ``model`` with these arguments and environment, started side by side; logs go to ``folder``.

    The router finds them by their nodes at the master.
    """
    master = MasterServer(model, folder / "master.log")
    with contextlib.ExitStack() as stack:
        stack.enter_context(master)
        known = {**environment, "UMBP_MASTER_ADDRESS": master.address}
        workers = [VllmServer(model, folder / f"worker-{n}.log", arguments, known) for n in range(count)]
        for worker in workers:
            stack.callback(worker.stop)
        with ThreadPoolExecutor(count) as starters:
            list(starters.map(VllmServer.start, workers))
        router = stack.enter_context(_router(master, folder, count, router_arguments))
        yield Cluster(master, workers, router)


@contextlib.contextmanager
def second_router(started: Cluster, folder: Path, arguments: Sequence[str]) -> Iterator[RouterServer]:
    """Another router in front of the same workers, with other arguments."""
    with _router(started.master, folder, len(started.workers), arguments) as router:
        yield router


@contextlib.contextmanager
def _router(master: MasterServer, folder: Path, workers: int, arguments: Sequence[str]) -> Iterator[RouterServer]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = ["--master", master.address, *arguments]
    with RouterServer(master.model, folder / "router.log", flags, {"PYTHONPATH": paths}) as router:
        wait_until_seated(router, workers)
        yield router


def wait_until_seated(router: RouterServer, count: int, timeout: float = 60.0) -> None:
    """Wait until the router knows ``count`` workers that answer.  Raises ``TimeoutError``."""
    router.wait_for_metric("umbp_router_worker_alive", count, timeout)
