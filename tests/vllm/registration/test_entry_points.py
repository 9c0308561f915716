"""The two functions that run in every vLLM process of the environment: cheap, silent, and never in the way."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

import umbp_vllm
from umbp_vllm import registration

IMPORT = """
import json, sys, time
before = set(sys.modules)
start = time.process_time()
import umbp_vllm
light = time.process_time() - start
umbp_vllm.early_platform()
both = time.process_time() - start
umbp_vllm.early_platform()
new = {name.partition(".")[0] for name in set(sys.modules) - before}
finders = [type(finder).__name__ for finder in sys.meta_path]
print(json.dumps({"light": light, "both": both, "new": sorted(new), "finders": finders}))
"""


def test_pyproject_declares_the_two_functions_under_one_name(
    declared_entry_points: dict[str, dict[str, str]],
) -> None:
    # One name in every group: VLLM_PLUGINS=umbp keeps all of them.
    assert declared_entry_points["vllm.general_plugins"] == {"umbp": "umbp_vllm:register"}
    assert declared_entry_points["vllm.platform_plugins"] == {"umbp": "umbp_vllm:early_platform"}


@pytest.fixture(scope="module")
def imported(environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    return json.loads(done.stdout)


def test_importing_the_package_is_light(imported: dict[str, Any]) -> None:
    heavy = {"torch", "vllm", "grpc", "numpy", "pydantic", "msgspec", "pluggy", "umbp_connectors"}
    assert not heavy & set(imported["new"])
    assert imported["light"] < 0.05
    assert imported["both"] < 0.1


def test_the_early_hook_is_installed_once(imported: dict[str, Any]) -> None:
    assert imported["finders"].count("_OneShotFinder") == 1
    assert imported["finders"][0] == "_OneShotFinder"


@pytest.mark.parametrize("function", [umbp_vllm.register, umbp_vllm.early_platform])
def test_nothing_escapes_where_vllm_is_broken(
    function: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    with caplog.at_level(logging.WARNING, "umbp_vllm"):
        assert function() is None
    # A set: an engine that ran in this process before has given our loggers its own handlers too.
    warned = {record.getMessage() for record in caplog.records}
    assert warned == (
        {"umbp could not be registered; vLLM goes on without it"} if function is umbp_vllm.register else set()
    )


def test_a_failing_flag_hook_still_registers_the_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[str] = []
    monkeypatch.setattr(registration, "register_connector", lambda: registered.append("umbp"))
    monkeypatch.setattr(registration.engine_args, "install", lambda module: module["no such thing"])
    umbp_vllm.register()
    assert registered == ["umbp"]


def test_a_name_that_is_taken_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    taken = {"umbp": object}
    monkeypatch.setattr(KVConnectorFactory, "_registry", taken)
    registration.register_connector()
    assert taken == {"umbp": object}
    monkeypatch.setattr(KVConnectorFactory, "_registry", {})
    registration.register_connector()
    registration.register_connector()
    assert list(KVConnectorFactory._registry) == ["umbp"]


@pytest.mark.parametrize(("value", "wanted"), [("1", False), ("true", False), ("0", True), ("", True), ("off", True)])
def test_the_kill_switch_takes_the_usual_words(value: str, wanted: bool) -> None:
    assert registration.hooks_wanted({registration.NO_CLI_HOOK: value}) is wanted
    assert registration.hooks_wanted({})
