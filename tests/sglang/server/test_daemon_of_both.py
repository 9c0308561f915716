"""SGLang and vLLM at once on one daemon, which is killed and started again under load: right tokens throughout."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.serving_sglang import PAGE_TOKENS, SglangServer, extra_config
from tests.connectors.daemon.processes import daemon
from tests.connectors.waiting import until
from tests.sglang.server.servers import (
    DRIVERS,
    MAX_TOKENS,
    PAGES,
    VLLM_PYTHON,
    needs_vllm,
    prompts,
    server,
    vllm_environment,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

QUESTIONS = prompts(700, 2)
WHOLE = PAGES * PAGE_TOKENS
VLLM_WHOLE = (PAGES * PAGE_TOKENS + 10) // 64 * 64

Round = tuple[list[list[int]], list[int]]
"""The tokens of every answer, and how many prompt tokens came from the pool."""


class Vllm:
    """vLLM in a process and a Python of its own."""

    def __init__(self, model: Path, pool: dict[str, object]) -> None:
        command = [VLLM_PYTHON, str(DRIVERS / "vllm_over_daemon.py")]
        environment = {**os.environ, **vllm_environment()}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say({"model": str(model), "pool": pool})
        assert self._hear() == "ready\n"

    def _say(self, task: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ask(self) -> Round:
        """Ask everything once."""
        self._say({"prompts": QUESTIONS, "max_tokens": MAX_TOKENS})
        found = json.loads(self._hear())
        return [each["tokens"] for each in found], [each["cached"] for each in found]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate(timeout=120)


class Load:
    """One engine that is asked the same again and again, in a thread."""

    def __init__(self, ask: Callable[[], Round]) -> None:
        self.rounds: list[Round] = []
        self.failed: list[BaseException] = []
        self._ask = ask
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.rounds.append(self._ask())
        except BaseException as error:
            self.failed.append(error)
            raise

    def reaches(self, hits: list[int], rounds: int = 1) -> None:
        """Wait until the last ``rounds`` rounds from now on took so many tokens from the pool."""
        first = len(self.rounds)

        def has() -> bool:
            assert not self.failed
            return [found for _, found in self.rounds[first:]][-rounds:] == [hits] * rounds

        until(has)

    def close(self) -> None:
        """End it."""
        self._stop.set()
        self._thread.join(60)


def _asked(running: SglangServer) -> Round:
    running.flush_cache()
    answers = [running.complete(each, MAX_TOKENS) for each in QUESTIONS]
    return [answer.tokens for answer in answers], [answer.storage for answer in answers]


@needs_vllm
def test_both_engines_on_one_daemon_that_is_killed_and_started_again_under_load(model: Path, tmp_path: Path) -> None:
    socket = tmp_path / "run" / "daemon.sock"
    ours = {"mode": "daemon", "daemon_socket": str(socket), "dram_capacity": "32MiB"}
    with contextlib.ExitStack() as ending:
        first = daemon(socket, "--dram-capacity", "64MiB")
        ending.callback(first.kill)
        vllm = Vllm(model, {**ours, "dram_prefault": False, "lookup_timeout_ms": 60_000})
        ending.callback(vllm.close)
        sglang = ending.enter_context(server(model, tmp_path, *extra_config(**ours)))
        right = {"vllm": vllm.ask()[0], "sglang": _asked(sglang)[0]}
        loads = {"vllm": Load(vllm.ask), "sglang": Load(lambda: _asked(sglang))}
        for load in loads.values():
            ending.callback(load.close)
        whole = {"vllm": [VLLM_WHOLE] * 2, "sglang": [WHOLE] * 2}
        for name, load in loads.items():
            load.reaches(whole[name])
        first.kill()
        for load in loads.values():
            load.reaches([0, 0], rounds=2)
        second = daemon(socket, "--dram-capacity", "64MiB")
        ending.callback(second.kill)
        for name, load in loads.items():
            load.reaches(whole[name])
        for load in loads.values():
            load.close()
    for name, load in loads.items():
        assert [tokens for tokens, _ in load.rounds if tokens != right[name]] == [], name
