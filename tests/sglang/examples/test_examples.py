"""The examples run as written, and the demo would notice if it showed nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo_sglang import COLD, DEVICE, DRAM, SSD, Phase, faults_of
from examples.serving_sglang import SglangAnswer

ROOT = Path(__file__).resolve().parents[3]


def answer(*tokens: int, device: int = 0, storage: int = 0) -> SglangAnswer:
    """An answer whose best candidate leads the runner-up (best + 1) by 0.3 nats."""
    choices = tuple({token: -0.5, token + 1: -0.8} for token in tokens)
    return SglangAnswer(tokens, choices, 0.1, 0.2, device + storage, device, 0, storage)


def phases(bad: Phase | None = None) -> list[Phase]:
    """Four phases without a fault, but for ``bad``."""
    good = [
        Phase(COLD, (answer(1, 2, 3),)),
        Phase(DEVICE, (answer(1, 2, 3, device=64),)),
        Phase(DRAM, (answer(1, 2, 3, storage=64),), 1),
        Phase(SSD, (answer(1, 2, 3, storage=64),), 1),
    ]
    return [bad if bad is not None and bad.name == phase.name else phase for phase in good]


def test_the_demo_accepts_what_is_right() -> None:
    assert faults_of(phases(), tie=0.0) == []


@pytest.mark.parametrize(
    "bad",
    [
        Phase(DRAM, (answer(1, 2, 4, storage=64),), 1),
        Phase(DRAM, (answer(1, 2, storage=64),), 1),
        Phase(DRAM, (answer(1, 2, 3),), 1),
        Phase(DRAM, (answer(1, 2, 3, storage=64),), 0),
        Phase(SSD, (answer(1, 2, 3, storage=64),), 0),
        Phase(DEVICE, (answer(1, 2, 3, storage=64),)),
    ],
    ids=["another token", "a token less", "nothing cached", "not from DRAM", "not from SSD", "not from the device"],
)
def test_the_demo_fails_when_it_shows_nothing(bad: Phase) -> None:
    (fault,) = faults_of(phases(bad), tie=0.0)
    assert fault.startswith(bad.name)


def test_a_tie_counts_only_where_it_is_allowed() -> None:
    swapped = Phase(DRAM, (answer(1, 3, 9, storage=64),), 1)
    assert faults_of(phases(swapped), tie=0.5) == []
    assert len(faults_of(phases(swapped), tie=0.2)) == 1


def run(example: str, *arguments: str) -> list[str]:
    """The lines that an example prints, run as a user would."""
    result = subprocess.run(
        [sys.executable, f"examples/{example}.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.engine
def test_the_offline_example_reuses_its_prompt() -> None:
    computed, reused = [line for line in run("offline_sglang") if "tokens reused" in line]
    assert computed.startswith("computed: 0 tokens reused")
    assert reused.startswith("from the pool: 1472 tokens reused")
    assert computed.split("s, ")[1] == reused.split("s, ")[1]


@pytest.mark.slow
@pytest.mark.engine
def test_the_pool_is_attached_and_detached_while_the_server_runs() -> None:
    lines = [line.split(": ") for line in run("attach_sglang") if "tokens from storage" in line]
    found = {state: int(what.split()[0]) for state, what in lines}
    assert found == {
        "without a storage": 0,
        "attached": 0,
        "flushed": 960,
        "detached": 0,
        "attached again": 960,
    }
    assert len({what.partition(", ")[2] for _, what in lines}) == 1, "the tokens are the same each time"


@pytest.mark.slow
@pytest.mark.engine
def test_the_demo_shows_both_tiers() -> None:
    lines = run("demo_sglang", "--prompts", "1", "--tokens", "1024")
    assert any(line.startswith("│ L3 hit, DRAM") and "dram" in line for line in lines), lines
    assert any(line.startswith("│ L3 hit, SSD after restart") and "ssd" in line for line in lines), lines
