"""What `make` starts where everything is installed already: the work itself, at once, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ENVIRONMENTS = (".venv", ".venv-vllm", ".venv-sglang")
BUDGET_S = 2.0
ATTEMPTS = 20
PYTEST = "-m pytest --numprocesses {} --dist loadfile --no-loadscope-reorder"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The repository after everything was installed: environments whose programs only say how they were called."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".venv") and path.name not in {".overlay", ".git"}:
            (tmp_path / path.name).symlink_to(path)
    for name in ENVIRONMENTS:
        ready(tmp_path / name)
    return tmp_path


def ready(folder: Path) -> None:
    """An environment that is newer than what it was made of."""
    (folder / "bin").mkdir(parents=True)
    for program in ("python", "lint-imports"):
        stub(folder / "bin" / program, folder.name)
    (folder / ".ready").touch()


def stub(path: Path, name: str) -> None:
    path.write_text(f'#!/bin/sh\necho "{name}: $*" PYTHONPATH="$PYTHONPATH"\n', encoding="utf-8")
    path.chmod(0o755)


def make(clone: Path, *arguments: str) -> list[str]:
    """What was called, in order."""
    return [line.rpartition(" PYTHONPATH=")[0] for line in calls(clone, *arguments)]


def calls(clone: Path, *arguments: str) -> list[str]:
    """The same, with the Python path that it was called with."""
    env = {"PATH": os.environ["PATH"], "HOME": str(clone)}
    command = ["make", "--no-print-directory", "--silent", *arguments]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("target", "called"),
    [
        ("demo", ".venv-vllm: examples/demo_vllm.py"),
        ("test-unit", f".venv: {PYTEST.format(2)}"),
        ("test-vllm", f".venv-vllm: {PYTEST.format(2)} tests/vllm tests/gpu"),
        ("test-sglang", f".venv-sglang: {PYTEST.format(2)} tests/sglang"),
    ],
)
def test_a_second_call_starts_work_within_two_seconds(clone: Path, target: str, called: str) -> None:
    """Once of many times: another process's load is not the Makefile's."""

    def seconds() -> float:
        start = time.monotonic()
        assert make(clone, target) == [called]
        return time.monotonic() - start

    assert any(seconds() < BUDGET_S for _ in range(ATTEMPTS))


def test_what_is_ready_is_not_made_twice(clone: Path) -> None:
    assert make(clone, "venv", "venv-vllm", "venv-sglang") == []


def test_a_changed_project_file_is_noticed(clone: Path) -> None:
    newer = (clone / "pyproject.toml").resolve().stat().st_mtime - 10
    os.utime(clone / ".venv" / ".ready", (newer, newer))
    (installed,) = make(clone, "venv")
    assert re.fullmatch(r"\.venv: -m pip install .*--editable \.\[dev\]", installed)
    assert make(clone, "venv") == []


def test_the_tests_are_linters_units_and_both_engines(clone: Path) -> None:
    called = make(clone, "test")
    linters, rest = called[:5], called[5:]
    assert [line.split()[2] for line in linters[:3]] == ["ruff", "ruff", "mypy"]
    assert linters[3:] == [".venv: --no-cache", ".venv: -m pytest -q tests/lint"]
    assert rest == [*make(clone, "test-unit"), *make(clone, "test-vllm"), *make(clone, "test-sglang")]


def test_every_python_that_is_promised_is_tried(clone: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    for version in promised:
        ready(clone / f".venv-python-{version}")
    assert make(clone, "test-pythons") == [f".venv-python-{version}: {PYTEST.format(2)}" for version in promised]


def test_a_python_that_is_not_there_is_named(clone: Path) -> None:
    command = ["make", "--no-print-directory", "test-python-2.0"]
    done = subprocess.run(
        command, cwd=clone, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "No Python for the tests with Python 2.0: it needs one of 2.0" in done.stderr


def test_a_vllm_that_is_there_is_used_beside_an_overlay(clone: Path) -> None:
    """It is the user's: it is started with a folder of ours on its path, and no environment of ours is asked for."""
    theirs = clone / "python"
    stub(theirs, "theirs")
    overlay = clone / ".overlay" / str(theirs).replace("/", "_")
    overlay.mkdir(parents=True)
    (overlay / ".ready").touch()
    (clone / ".venv-vllm" / ".ready").unlink()
    (called,) = calls(clone, "demo", f"VLLM_PYTHON={theirs}")
    assert called == f"theirs: examples/demo_vllm.py PYTHONPATH={overlay}:"
    one_at_a_time, *_ = make(clone, "test-vllm", f"VLLM_PYTHON={theirs}")
    assert one_at_a_time == f"theirs: {PYTEST.format(0)} tests/vllm tests/gpu"


@pytest.mark.parametrize("jobs", [1, 6])
def test_how_many_files_are_tested_at_once_may_be_said(clone: Path, jobs: int) -> None:
    assert make(clone, "test-unit", f"JOBS={jobs}") == [f".venv: {PYTEST.format(jobs)}"]


def test_every_benchmark_is_run(clone: Path) -> None:
    called = {Path(line.split()[1]) for line in make(clone, "bench")}
    folder = ROOT / "benchmarks"
    programs = [path for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert called == {path.relative_to(ROOT) for path in programs}


def test_ci_runs_what_a_developer_runs() -> None:
    script = [line for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if line]
    assert script[-1] == "exec make test"
    assert re.search(r"^test: lint test-unit test-vllm test-sglang\b", MAKEFILE, re.MULTILINE)
