"""The examples run as written, and the demo would notice if it showed nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo_vllm import COLD, DRAM, ENGINE, SSD, Phase, faults_of
from examples.serving import Answer, cpu_environment

ROOT = Path(__file__).resolve().parents[3]


def answer(*tokens: int, cached: int = 64) -> Answer:
    """An answer whose best candidate leads the runner-up (best + 1) by 0.3 nats."""
    return Answer(tokens, tuple({token: -0.5, token + 1: -0.8} for token in tokens), 0.1, 0.2, cached)


def phases(**changed: Phase) -> list[Phase]:
    """Four phases without a fault, but for those that are ``changed``."""
    good = {name: Phase(name, (answer(1, 2, 3),), 64) for name in (ENGINE, DRAM, SSD)}
    good = {COLD: Phase(COLD, (answer(1, 2, 3, cached=0),), 0), **good}
    return [changed.get(name.split()[0], phase) for name, phase in good.items()]


def test_the_demo_accepts_what_is_right() -> None:
    assert faults_of(phases(), tie=0.0) == []


@pytest.mark.parametrize(
    "bad",
    [
        Phase(DRAM, (answer(1, 2, 4),), 64),
        Phase(DRAM, (answer(1, 2),), 64),
        Phase(DRAM, (answer(1, 2, 3, cached=0),), 64),
        Phase(DRAM, (answer(1, 2, 3),), 0),
    ],
    ids=["another token", "a token less", "nothing cached", "from elsewhere"],
)
def test_the_demo_fails_when_it_shows_nothing(bad: Phase) -> None:
    (fault,) = faults_of(phases(DRAM=bad), tie=0.0)
    assert fault.startswith(DRAM)


def test_a_tie_is_a_tie_only_as_far_as_allowed() -> None:
    cold = answer(10, 20, 30)
    assert cold.agrees(answer(10, 21, 99), tie=0.5)
    assert not cold.agrees(answer(10, 21, 99), tie=0.2)
    assert not cold.agrees(answer(10, 22, 30), tie=0.5)


@pytest.mark.slow
def test_the_demo_shows_both_tiers() -> None:
    result = subprocess.run(
        [sys.executable, "examples/demo_vllm.py", "--prompts", "1", "--tokens", "512"],
        cwd=ROOT,
        env={**os.environ, **cpu_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    found = {name: (int(reused), source, same) for name, reused, source, *_, same in rows}
    assert found[COLD] == (0, "-", "yes")
    for name, source in ((ENGINE, "device"), (DRAM, "host"), (SSD, "disk")):
        reused, said, same = found[name]
        assert 0 < reused <= 512
        assert (said.split()[1], same) == (source, "yes")


@pytest.mark.slow
def test_the_offline_example_reuses_its_prompt() -> None:
    environment = {**os.environ, **cpu_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment |= {"UMBP_DRAM_CAPACITY": "1GiB", "VLLM_LOGGING_LEVEL": "ERROR"}
    result = subprocess.run(
        [sys.executable, "examples/offline_vllm.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    computed, reused = [line for line in result.stdout.splitlines() if "tokens reused" in line]
    assert computed.startswith("computed: 0 tokens reused")
    assert reused.startswith("from the pool: 1408 tokens reused")
    assert computed.split("s, ")[1] == reused.split("s, ")[1]
