"""The router's command line."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.router.__main__ import parse
from examples.router.settings import Policy
from tests.router.fakes import DEADLINE, FakeWorker, calling
from umbp_core.errors import ConfigError
from umbp_core.tiers import Tier

ROOT = Path(__file__).resolve().parents[2]


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "42")
    monkeypatch.setenv("UMBP_MASTER_ADDRESS", "umbp://m:1")
    speeds = [
        each for pair in ("ssd=0.5", "prefill=2", "remote=3", "stream=4") for each in ("--seconds-per-token", pair)
    ]
    found = parse(["--worker", "http://h:1", "--policy", "turn", "--match-timeout", "9", "--attempts", "5", *speeds])
    assert (found.master, found.workers, found.policy, found.hash_seed) == (
        "umbp://m:1",
        ("http://h:1",),
        Policy.TURN,
        "42",
    )
    assert (found.match_timeout, found.attempts, found.host) == (9.0, 5, "127.0.0.1")
    assert (found.speeds.prefill, found.speeds.remote, found.speeds.stream) == (2.0, 3.0, 4.0)
    assert found.speeds.tiers[Tier.SSD] == 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "neither workers nor a master"),
        (["--worker", "h:1", "--seconds-per-token", "ssd"], "no number"),
        (["--worker", "h:1", "--seconds-per-token", "tape=1"], "no known kind"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UMBP_MASTER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=says):
        parse(arguments)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UMBP_")}
    return kept | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "core")))}


def test_the_process_serves_until_it_is_asked_to_end() -> None:
    async def test() -> None:
        async with FakeWorker("a") as worker:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "examples.router", "--port", "0", "--worker", worker.url),
                cwd=ROOT,
                env=environment(),
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            line = (await asyncio.wait_for(process.stdout.readline(), DEADLINE)).decode().strip()
            assert line.startswith("router ready: http://127.0.0.1:")
            async with calling(int(line.rpartition(":")[2])) as call:
                assert (await call.complete("p")).worker == worker.url
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), DEADLINE) == 0

    asyncio.run(test())


def test_a_wrong_start_is_one_sentence() -> None:
    command = [sys.executable, "-m", "examples.router", "--worker", "no address"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "router: 'no address' is no address of a worker; give http://HOST:PORT\n"
