"""Starting the connector from Python, whatever of vLLM is imported first; and what the kill switch leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

UMBP = {"connector": "umbp", "role": "kv_both", "extra": {}}
LLM_FIRST = "from vllm import LLM"
STARTS: dict[str, tuple[str, dict[str, str]]] = {
    "LLM first": (LLM_FIRST, {}),
    "EngineArgs first": ("from vllm import EngineArgs", {}),
    "config first, filtered": ("import vllm.config", {"VLLM_PLUGINS": "umbp"}),
}


@pytest.fixture(scope="module", params=STARTS)
def answers(request: pytest.FixtureRequest, drive: Any, model_dir: Path) -> dict[str, Any]:
    first, env = STARTS[request.param]
    return drive("python_api", {"first": first, "model": str(model_dir)}, **env)


def test_every_class_takes_the_keyword(answers: dict[str, Any]) -> None:
    assert answers["engine_args"] == {"args": UMBP}
    assert answers["async_engine_args"] == {"args": UMBP}
    assert answers["llm"] == {"args": UMBP, "config": UMBP}


def test_llm_takes_the_offloading_form(answers: dict[str, Any]) -> None:
    assert answers["llm_offloading"]["config"] == {**UMBP, "extra": {"cpu_bytes_to_use": 4 << 30}}


def test_the_keyword_merges_with_a_transfer_config_and_leaves_it_alone(answers: dict[str, Any]) -> None:
    assert answers["merged"] == {"args": {**UMBP, "extra": {"namespace": "a"}}}
    assert answers["merged_engine_id"] == "keep-me"
    assert answers["given_untouched"]


def test_contradictions_say_what_excludes_what(answers: dict[str, Any]) -> None:
    assert answers["conflict"]["error"].startswith("ConfigError: kv_connector='umbp'")
    assert "ExampleConnector" in answers["conflict"]["error"]
    assert answers["unknown_name"]["error"].startswith("ConfigError: kv_connector='nobody' is not known")
    assert answers["other_backend"]["error"].startswith("ConfigError: kv_offloading_backend='lmcache'")


def test_other_unknown_keywords_are_refused_as_ever(answers: dict[str, Any]) -> None:
    assert answers["unknown_keyword"]["error"].startswith("TypeError")


def test_without_the_keyword_nothing_changes(answers: dict[str, Any]) -> None:
    assert answers["plain"] == {"args": None}
    assert "kv_connector" not in answers["fields"]


def test_arguments_survive_pickling_and_replacing(answers: dict[str, Any]) -> None:
    assert answers["pickle"] == answers["replaced"] == {**UMBP, "extra": {"namespace": "a"}}


def test_the_factory_finds_the_class_also_below_multi_connector(answers: dict[str, Any]) -> None:
    assert answers["class"] == "UmbpConnector"
    assert answers["multi_hma"] is True
    assert answers["multi"]["config"]["connector"] == "MultiConnector"


def test_below_multi_connector_a_failed_load_is_recomputed_too(answers: dict[str, Any]) -> None:
    # With umbp, with umbp that asks for failure, and without umbp; the user's own object is not changed.
    assert answers["multi_policies"] == ["recompute", "fail", "fail"]
    assert answers["multi_untouched"] == "fail"


def test_below_multi_connector_the_policy_may_stand_wherever_a_key_may(answers: dict[str, Any]) -> None:
    assert answers["multi_policies_elsewhere"] == {"environment": "fail", "file": "fail"}


def test_a_policy_in_the_fields_of_a_transfer_config_is_kept(answers: dict[str, Any]) -> None:
    assert answers["dict_with_policy"] == {"args": {**UMBP, "extra": {"load_failure_policy": "fail"}}}


def test_umbp_hears_how_many_data_parallel_engines_there_are(answers: dict[str, Any]) -> None:
    # vLLM hides it from the engines of a dense model.  What the user says stays, and so do the user's objects.
    plain, said, multi = answers["two_engines"]
    assert (plain, said) == ({"namespace": "a", "ssd_engines": 2}, {"ssd_engines": 4})
    assert multi["connectors"][0]["kv_connector_extra_config"] == {"ssd_engines": 2}
    assert "kv_connector_extra_config" not in multi["connectors"][1]
    assert answers["two_untouched"] == [{"namespace": "a"}, True]


def test_no_import_hook_is_left_behind(answers: dict[str, Any]) -> None:
    assert answers["new_finders"] == []


def test_the_kill_switch_leaves_only_the_complete_json_form(drive: Any, model_dir: Path) -> None:
    answers = drive("kill_switch", {"first": LLM_FIRST, "model": str(model_dir)}, UMBP_VLLM_NO_CLI_HOOK="1")
    assert answers == {"json": UMBP, "keyword": "TypeError", "flag": False, "backend": False}
