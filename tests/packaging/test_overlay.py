"""A Python that has a vLLM already gets this package beside it: nothing in it is changed, nothing in it is hidden."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("overlay", ROOT / "scripts" / "overlay.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


overlay = script()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's environment: a vLLM, something of what we need, and no pip."""
    folder = tmp_path_factory.mktemp("theirs")
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "vllm.py").touch()
    distribution(site, "there", "2.0")
    packaging = Path(importlib.util.find_spec("packaging").submodule_search_locations[0])  # type: ignore[union-attr,index]
    (site / "packaging").symlink_to(packaging)
    return folder


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    """What is installed as ``name``, for those who ask the metadata."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *map("Requires-Dist: {}".format, requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_only_what_is_missing_comes_and_it_comes_beside(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the missing ones need themselves; and of our extras only the tests'."""
    needs = {
        "umbp-connectors": ["there>=1", "missing>=3", "for-tests; extra == 'test'", "for-us; extra == 'dev'"],
        "missing": ["there", "deep; python_version > '3'", "never; python_version < '3'"],
    }
    asked: list[str] = []

    def install(python: str, folder: Path, requirements: list[str]) -> None:
        assert (python, folder) == (str(theirs / "bin" / "python"), tmp_path / "beside")
        for requirement in requirements:
            name = "umbp-connectors" if requirement == str(ROOT) else requirement.partition(">")[0]
            asked.append(requirement)
            distribution(folder, name, "3.0", *needs.get(name, ()))

    before = sorted(theirs.rglob("*"))
    (tmp_path / "beside" / "left over").mkdir(parents=True)
    monkeypatch.setattr(overlay, "install", install)
    overlay.make(str(theirs / "bin" / "python"), tmp_path / "beside")
    assert asked == [str(ROOT), "for-tests", "missing>=3", "deep"]
    assert not (tmp_path / "beside" / "left over").exists()
    assert [path for path in sorted(theirs.rglob("*")) if "__pycache__" not in path.parts] == before


def test_what_is_installed_goes_into_the_folder_and_brings_nothing_along(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(overlay, "run", lambda command, folder: commands.append(command) or "")
    overlay.install("/usr/bin/theirs", Path("/beside"), ["missing>=3"])
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert command[command.index("--python") + 1] == "/usr/bin/theirs"
    assert command[command.index("--target") + 1] == "/beside"
    assert "--no-deps" in command
    assert command[-1] == "missing>=3"


def refused(python: str, folder: Path) -> str:
    """The sentence that ends the attempt."""
    command = [sys.executable, str(ROOT / "scripts" / "overlay.py"), python, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert not folder.exists()
    (sentence,) = done.stderr.splitlines()
    return sentence


def test_a_python_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    sentence = refused(str(tmp_path / "nobody"), tmp_path / "beside")
    assert f"VLLM_PYTHON={tmp_path / 'nobody'} is not a program" in sentence


def test_a_python_without_a_vllm_is_one_sentence(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    sentence = refused(str(python), tmp_path / "beside")
    assert str(python) in sentence
    assert "there is no vLLM in it" in sentence
