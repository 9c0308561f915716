"""``umbp doctor`` beside a real SGLang: what it calls live is live, and what is switched off is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HOOKS = {"hook command line", "hook zero copy", "hook draft heads", "hook host pool", "--hicache-storage-backend umbp"}
LIVE = {"backend umbp", "entry point sglang.srt.plugins", *HOOKS}

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def examine(**env: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the findings by topic."""
    code = "from umbp_connectors.cli import main; main()"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UMBP_", "SGLANG_PLUGINS"))}
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        env=kept | {"UMBP_DRAM_CAPACITY": "16MiB"} | env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, {finding["topic"]: finding for finding in json.loads(done.stdout)}


def test_everything_is_live() -> None:
    _, findings = examine()
    assert {topic: findings[topic]["status"] for topic in LIVE} == dict.fromkeys(LIVE, "ok")
    assert "tested" in findings["SGLang"]["found"]


@pytest.mark.parametrize(
    ("env", "problems", "advice"),
    [
        ({"UMBP_SGLANG_NO_HOOKS": "1"}, {"backend umbp"}, "unset it"),
        ({"SGLANG_PLUGINS": "another"}, {"backend umbp", "entry point sglang.srt.plugins"}, "SGLANG_PLUGINS"),
    ],
    ids=["kill switch", "left out"],
)
def test_what_is_off_is_named_with_what_to_do(env: dict[str, str], problems: set[str], advice: str) -> None:
    code, findings = examine(**env)
    assert {topic for topic in LIVE if findings.get(topic, {}).get("status") == "problem"} == problems
    assert any(advice in findings[topic]["advice"] for topic in problems)
    assert code == 1
