"""On a vLLM that is not as expected the short forms are lost; its classes and parsers stay as they were."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from umbp_vllm import cli_flags, early, engine_args

EXPECTED = """
from dataclasses import dataclass
{probe}

@dataclass
class EngineArgs:
    kv_transfer_config: object = None
    kv_offloading_backend: str = "native"
    kv_offloading_size: float | None = None

    @staticmethod
    def add_cli_args(parser):
        return parser

    def create_engine_config(self):
        return self.kv_transfer_config

@dataclass
class AsyncEngineArgs(EngineArgs):
    more: int = 0
"""
LACKING = {
    "no async class": EXPECTED.replace("class AsyncEngineArgs", "class Another"),
    "no offloading fields": EXPECTED.replace("kv_offloading_size: float | None = None", "pass"),
    "no create_engine_config": EXPECTED.replace("def create_engine_config", "def create_config"),
    "no add_cli_args": EXPECTED.replace("def add_cli_args", "def add_args"),
}


def made(source: str) -> SimpleNamespace:
    names: dict[str, Any] = {"__name__": "made"}
    exec(compile(source.format(probe=""), "made.py", "exec", dont_inherit=True), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if isinstance(value, type)})


def methods(module: SimpleNamespace) -> list[dict[str, Any]]:
    return [dict(vars(cls)) for cls in vars(module).values()]


@pytest.mark.parametrize("source", LACKING.values(), ids=LACKING.keys())
def test_unexpected_argument_classes_stay_as_they_were(source: str) -> None:
    module = made(source)
    before = methods(module)
    with pytest.raises((AttributeError, LookupError)):
        engine_args.install(module)
    assert methods(module) == before


def test_a_vllm_with_the_keyword_of_its_own_is_left_alone() -> None:
    module = made(
        EXPECTED.replace(
            "kv_transfer_config: object = None", "kv_transfer_config: object = None; kv_connector: str = ''"
        )
    )
    before = methods(module)
    engine_args.install(module)
    assert methods(module) == before


def test_installing_twice_wraps_once() -> None:
    module = made(EXPECTED)
    engine_args.install(module)
    before = methods(module)
    engine_args.install(module)
    assert methods(module) == before
    assert dataclasses.asdict(module.AsyncEngineArgs(more=1))["more"] == 1
    assert module.EngineArgs.add_cli_args("parser without options") == "parser without options"


def parser_with(*options: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    for option in options:
        parser.add_argument(option, type=str)
    return parser


def test_a_parser_with_the_flag_of_its_own_is_left_alone() -> None:
    parser = parser_with("--kv-connector", "--kv-transfer-config", "--kv-offloading-backend")
    before = [dict(vars(action)) for action in parser._actions]
    cli_flags.extend(parser)
    assert [dict(vars(action)) for action in parser._actions] == before


@pytest.mark.parametrize("options", [(), ("--kv-transfer-config",), ("--kv-offloading-backend",)])
def test_a_parser_without_vllms_options_is_left_alone(options: tuple[str, ...]) -> None:
    parser = parser_with(*options)
    before = [dict(vars(action)) for action in parser._actions]
    with pytest.raises(KeyError):
        cli_flags.extend(parser)
    assert [dict(vars(action)) for action in parser._actions] == before


def test_a_parser_without_groups_or_choices_takes_the_flag() -> None:
    parser = parser_with("--kv-transfer-config", "--kv-offloading-backend")
    cli_flags.extend(parser)
    assert parser.parse_args(["--kv-connector", "umbp"]).kv_transfer_config.kv_connector == "umbp"
    assert parser.parse_args(["--kv-offloading-backend", "umbp"]).kv_offloading_backend == "umbp"


def test_one_parse_knows_nothing_of_the_one_before() -> None:
    parser = parser_with("--kv-transfer-config", "--kv-offloading-backend")
    cli_flags.extend(parser)
    parser.parse_args(["--kv-connector", "umbp"])
    assert parser.parse_args([]).kv_transfer_config is None
    assert parser.parse_args(["--kv-offloading-backend", "native"]).kv_offloading_backend == "native"


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module name that stands for ``vllm.engine.arg_utils``; its source is ``target.py`` in ``tmp_path``."""
    name = "umbp_test_arg_utils"
    monkeypatch.setattr(early, "TARGET", name)
    others = [finder for finder in sys.meta_path if not isinstance(finder, early._OneShotFinder)]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("UMBP_VLLM_NO_CLI_HOOK", raising=False)
    yield name
    sys.modules.pop(name, None)


def write(tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / f"{name}.py").write_text(source)
    importlib.invalidate_caches()


def ours() -> list[object]:
    return [finder for finder in sys.meta_path if isinstance(finder, early._OneShotFinder)]


def takes_keyword(module: Any) -> bool:
    try:
        return module.EngineArgs(kv_connector="umbp").kv_transfer_config.kv_connector == "umbp"
    except TypeError:
        return False


PROBES = {"before the import": "", "from within it": "from umbp_vllm import early; early.install()"}


@pytest.mark.parametrize("decorator", ["@dataclass", "@dataclass(eq=True)"])
@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES.keys())
def test_classes_are_patched_as_soon_as_they_exist(probe: str, decorator: str, target: str, tmp_path: Path) -> None:
    write(tmp_path, target, EXPECTED.format(probe=probe).replace("@dataclass", decorator))
    if not probe:
        early.install()
    module = importlib.import_module(target)
    assert takes_keyword(module)
    assert module.AsyncEngineArgs(kv_connector="umbp").kv_transfer_config.kv_role == "kv_both"
    assert not ours()
    assert vars(module)["dataclass"] is dataclasses.dataclass
    assert "exec_module" not in vars(module.__spec__.loader)
    assert "EngineArgs" in module.__spec__.loader.get_source(target)


def test_classes_that_exist_are_patched_at_once(target: str, tmp_path: Path) -> None:
    write(tmp_path, target, EXPECTED.format(probe=""))
    module = importlib.import_module(target)
    assert not takes_keyword(module)
    early.install()
    assert takes_keyword(module)
    assert not ours()


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES.keys())
@pytest.mark.parametrize("source", LACKING.values(), ids=LACKING.keys())
def test_unexpected_modules_are_imported_as_ever(source: str, probe: str, target: str, tmp_path: Path) -> None:
    write(tmp_path, target, source.format(probe=probe))
    early.install()
    module = importlib.import_module(target)
    assert module.EngineArgs().kv_transfer_config is None
    assert not takes_keyword(module)
    assert not ours()


def test_an_import_that_fails_fails_as_ever(target: str, tmp_path: Path) -> None:
    write(tmp_path, target, "raise RuntimeError('theirs')")
    early.install()
    with pytest.raises(RuntimeError, match="theirs"):
        importlib.import_module(target)
    assert not ours()


def test_a_module_that_is_not_there_is_not_there(target: str) -> None:
    early.install()
    with pytest.raises(ModuleNotFoundError, match=target):
        importlib.import_module(target)


def test_the_kill_switch_covers_the_early_hook(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBP_VLLM_NO_CLI_HOOK", "1")
    write(tmp_path, target, EXPECTED.format(probe=""))
    early.install()
    assert not ours()
    assert not takes_keyword(importlib.import_module(target))
