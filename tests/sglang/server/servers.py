"""How the tests start SGLang: a tiny model, tokens that no rounding decides, a pool in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from examples.random_model import prompt
from examples.serving_sglang import PAGE_TOKENS, SglangServer, cpu_arguments, cpu_only

ADMIN_KEY = "for the tests"
PAGES = 15
MAX_TOKENS = 8
DRIVERS = Path(__file__).parent / "drivers"
LAUNCH_SERVER = ("-m", "sglang.launch_server")
FORKED = (str(DRIVERS / "forked_server.py"),)
"""The same in half the time, where a test is not about the start (see there)."""
VLLM_PYTHON = os.environ.get("TEST_VLLM_PYTHON", "")
"""A Python with a vLLM, for the tests of both engines; empty where there is none."""
needs_vllm = pytest.mark.skipif(
    not VLLM_PYTHON, reason="TEST_VLLM_PYTHON names no Python with a vLLM; `make test-sglang` makes one"
)


def vllm_environment() -> dict[str, str]:
    """What :data:`VLLM_PYTHON` is started with: our packages, and not the stand-ins that SGLang needs here."""
    return {"PYTHONPATH": os.environ.get("TEST_VLLM_PYTHONPATH", ""), "VLLM_CPU_KVCACHE_SPACE": "1"}


def prompts(first: int, count: int) -> list[list[int]]:
    """Prompts of :data:`PAGES` whole pages and a rest, different for every number."""
    return [prompt(PAGES * PAGE_TOKENS + 10, seed=seed) for seed in range(first, first + count)]


def server(model: Path, folder: Path, *arguments: str, **settings: Any) -> SglangServer:
    """A server of ``model``; its log lies in ``folder``.  Without a ``launcher`` it is :data:`FORKED`."""
    settings.setdefault("launcher", FORKED)
    fixed = [
        *("--max-total-tokens", "8192", "--max-running-requests", "4", "--context-length", "2048"),
        *("--hicache-storage-prefetch-policy", "wait_complete"),
    ]
    if cpu_only():
        fixed += [*cpu_arguments(), "--dtype", "float32"]
    return SglangServer(model, folder / "server.log", [*fixed, *arguments], admin_key=ADMIN_KEY, **settings)


def engine_arguments(model: Path, pool: Mapping[str, object]) -> dict[str, object]:
    """The same for ``sglang.Engine``."""
    arguments: dict[str, object] = {
        "model_path": str(model),
        "served_model_name": "random",
        "page_size": PAGE_TOKENS,
        "max_total_tokens": 8192,
        "max_running_requests": 4,
        "context_length": 2048,
        "enable_cache_report": True,
        "enable_hierarchical_cache": True,
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend": "umbp",
        "hicache_storage_backend_extra_config": json.dumps(pool),
    }
    if cpu_only():
        arguments |= {
            "device": "cpu",
            "dtype": "float32",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_cuda_graph": True,
            "hicache_ratio": 2,
        }
    return arguments


def drive(name: str, task: object, python: str = sys.executable, **environment: str) -> Any:
    """What the driver ``name`` answers: the last line of its output, as JSON."""
    done = subprocess.run(
        [python, str(DRIVERS / f"{name}.py")],
        input=json.dumps(task),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])
