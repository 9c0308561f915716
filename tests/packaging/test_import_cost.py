"""The entry points run in every engine process, also where nobody uses the pool: they must cost nothing."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HEAVY = {"torch", "vllm", "sglang", "grpc", "transformers", "numpy", "pydantic", "rich", "typer"}
BUDGET_MS = 50
ATTEMPTS = 20


@pytest.fixture(scope="session")
def site(wheel_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content as a folder to import from."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel_path) as archive:
        archive.extractall(folder)
    return folder


def run(site: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", *options, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.parametrize("package", ["umbp_vllm", "umbp_sglang"])
def test_adapter_imports_nothing_heavy(site: Path, package: str) -> None:
    done = run(site, f"import json, {package}; print(json.dumps(sorted(sys.modules)))")
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("package", ["umbp_vllm", "umbp_sglang"])
def test_adapter_imports_in_time(site: Path, package: str) -> None:
    """Once of many times: another process's load is not the import's."""

    def milliseconds() -> float:
        report = run(site, f"import {package}", "-X", "importtime").stderr
        total = re.search(rf"\|\s+(\d+) \| {package}$", report, re.MULTILINE)
        assert total is not None
        return int(total[1]) / 1000

    assert any(milliseconds() < BUDGET_MS for _ in range(ATTEMPTS))


def test_sglang_entry_point_does_not_raise_where_there_is_no_sglang(site: Path) -> None:
    code = "import umbp_sglang; umbp_sglang.register(); umbp_sglang.register(); print('alive')"
    assert run(site, code).stdout.strip() == "alive"


def test_vllm_entry_points_do_not_raise_where_there_is_no_vllm(site: Path) -> None:
    code = "import umbp_vllm; umbp_vllm.register(); umbp_vllm.early_platform(); print('alive')"
    assert run(site, code).stdout.strip() == "alive"
