"""``umbp doctor`` beside a real vLLM: what it calls live is live, and what is switched off is named."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FLAGS = {"--kv-connector", "--kv-offloading-backend umbp", "LLM(kv_connector=...)"}
LIVE = {"connector umbp", "entry point vllm.general_plugins", "entry point vllm.platform_plugins", *FLAGS}


def examine(environment: dict[str, str], **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the findings by topic."""
    code = "from umbp_connectors.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        env=environment | {"UMBP_DRAM_CAPACITY": "16MiB"} | env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, {finding["topic"]: finding for finding in json.loads(done.stdout)}


def test_everything_is_live(environment: dict[str, str]) -> None:
    code, findings = examine(environment)
    assert {topic: findings[topic]["status"] for topic in LIVE} == dict.fromkeys(LIVE, "ok")
    assert "supported" in findings["vLLM"]["found"]
    assert code == 0


@pytest.mark.parametrize(
    ("env", "problems", "advice"),
    [
        ({"UMBP_VLLM_NO_CLI_HOOK": "1"}, FLAGS, "unset it"),
        ({"VLLM_PLUGINS": "another"}, LIVE, "VLLM_PLUGINS"),
        ({"PYTHONHASHSEED": "random"}, {"block hashes"}, "PYTHONHASHSEED=0"),
    ],
    ids=["kill switch", "left out", "hash seed"],
)
def test_what_is_off_is_named_with_what_to_do(
    environment: dict[str, str], env: dict[str, str], problems: set[str], advice: str
) -> None:
    code, findings = examine(environment, **env)
    assert {topic for topic, finding in findings.items() if finding["status"] == "problem"} == problems
    assert all(findings[topic]["advice"] for topic in problems)
    assert any(advice in findings[topic]["advice"] for topic in problems)
    assert code == 1
