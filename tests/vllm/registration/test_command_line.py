"""Every form in which a user starts the connector from vLLM's real command line, up to the engine's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXTRA = {"namespace": "team-a"}
GIB = 1 << 30
NAMED = '{"kv_connector":"umbp","kv_role":"kv_both"}'
ROLELESS = '{"kv_connector":"umbp","kv_connector_extra_config":{"dram_bytes":4G}}'
UNNAMED = json.dumps({"kv_connector_extra_config": EXTRA})
FAILING = '{"kv_connector":"umbp","kv_role":"kv_both","kv_load_failure_policy":"fail"}'
RECOMPUTING = {"kv_connector_extra_config": {"load_failure_policy": "recompute"}}
OTHER = '{"kv_connector":"ExampleConnector","kv_role":"kv_both"}'
POLICY = "--kv-transfer-config.kv_load_failure_policy"
DOTTED = "--kv-transfer-config.kv_connector_extra_config.namespace"

FORMS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "flag": (["--kv-connector", "umbp"], {}),
    "flag with underscores": (["--kv_connector=umbp"], {}),
    "flag twice": (["--kv-connector", "umbp", "--kv-connector", "umbp"], {}),
    "json": (["--kv-transfer-config", NAMED], {}),
    "json without a role": (["--kv-transfer-config", ROLELESS], {"dram_bytes": 4 * GIB}),
    "dotted without a role": (["--kv-transfer-config.kv_connector", "umbp"], {}),
    "dotted with a role": (
        ["--kv-transfer-config.kv_connector", "umbp", "--kv-transfer-config.kv_role", "kv_both"],
        {},
    ),
    "flag, then dotted": (["--kv-connector", "umbp", DOTTED, "team-a"], EXTRA),
    "dotted, then flag": ([DOTTED, "team-a", "--kv-connector", "umbp"], EXTRA),
    "flag, then json without a name": (["--kv-connector", "umbp", "--kv-transfer-config", UNNAMED], EXTRA),
    "json without a name, then flag": (["--kv-transfer-config", UNNAMED, "--kv-connector", "umbp"], EXTRA),
    "flag and the same name in json": (["--kv-connector", "umbp", "--kv-transfer-config", NAMED], {}),
    "json with vLLM's policy": (["--kv-transfer-config", FAILING], {"load_failure_policy": "fail"}),
    "flag and vLLM's policy": (["--kv-connector", "umbp", POLICY, "recompute"], {"load_failure_policy": "recompute"}),
    "both policies": (
        ["--kv-transfer-config", json.dumps({**json.loads(FAILING), **RECOMPUTING})],
        {"load_failure_policy": "recompute"},
    ),
    "offloading": (["--kv-offloading-backend", "umbp", "--kv-offloading-size", "4"], {"cpu_bytes_to_use": 4 * GIB}),
    "offloading, half a GiB": (
        ["--kv-offloading-size", "0.5", "--kv-offloading-backend", "umbp"],
        {"cpu_bytes_to_use": GIB // 2},
    ),
    "offloading without a size": (["--kv-offloading-backend", "umbp"], {}),
    "flag and size": (["--kv-connector", "umbp", "--kv-offloading-size", "4"], {"cpu_bytes_to_use": 4 * GIB}),
    "flag, backend and size": (
        ["--kv-offloading-backend", "umbp", "--kv-connector", "umbp", "--kv-offloading-size", "1"],
        {"cpu_bytes_to_use": GIB},
    ),
    "offloading and json": (
        ["--kv-transfer-config", UNNAMED, "--kv-offloading-backend", "umbp", "--kv-offloading-size", "4"],
        {**EXTRA, "cpu_bytes_to_use": 4 * GIB},
    ),
}

PLACES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "a host and a port": (["--host", "10.1.2.3", "--port", "1234"], {"serving": "10.1.2.3:1234"}),
    "an IPv6 address": (["--host", "::1"], {"serving": "::1:8000"}),
    "a Unix socket": (["--uds", "/run/vllm.sock"], {}),
    "no server": (["--headless"], {}),
    "what the user says": ([f"{DOTTED.rpartition('.')[0]}.serving", "proxy:80"], {"serving": "proxy:80"}),
}
"""Arguments beside ``--kv-connector umbp``, and the connector's extra config."""

BELOW: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no policy": ({}, {}, "recompute"),
    "fail outside": ({"kv_load_failure_policy": "fail"}, {}, "fail"),
    "recompute outside": ({"kv_load_failure_policy": "recompute"}, {}, "recompute"),
    "fail inside": ({}, {"kv_load_failure_policy": "fail"}, "fail"),
    "fail among our keys": ({}, {"kv_connector_extra_config": {"load_failure_policy": "fail"}}, "fail"),
}
"""What ``MultiConnector`` and umbp below it say, and the policy that vLLM's scheduler reads."""

CONFLICTS: dict[str, tuple[list[str], str]] = {
    "flag, then another connector": (["--kv-connector", "umbp", "--kv-transfer-config", OTHER], "ExampleConnector"),
    "another connector, then flag": (["--kv-transfer-config", OTHER, "--kv-connector", "umbp"], "ExampleConnector"),
    "flag, then another backend": (["--kv-connector", "umbp", "--kv-offloading-backend", "native"], "exclude each"),
    "another backend, then flag": (["--kv-offloading-backend", "lmcache", "--kv-connector", "umbp"], "exclude each"),
    "backend, then another connector": (
        ["--kv-offloading-backend", "umbp", "--kv-transfer-config", OTHER],
        "exclude each other",
    ),
    "another connector, then backend": (
        ["--kv-transfer-config", OTHER, "--kv-offloading-backend", "umbp"],
        "exclude each other",
    ),
    "unknown connector": (["--kv-connector", "nobody"], "invalid choice"),
    "bad json": (["--kv-transfer-config", '{"kv_connector":'], "--kv-transfer-config"),
    "unknown key": (["--kv-transfer-config", '{"kv_connector":"umbp","kv_rolle":"kv_both"}'], "kv_rolle"),
}

UNTOUCHED: dict[str, tuple[list[str], dict[str, Any] | None]] = {
    "nothing": ([], None),
    "another connector": (
        ["--kv-transfer-config", OTHER],
        {"connector": "ExampleConnector", "role": "kv_both", "extra": {}},
    ),
    "native offloading": (
        ["--kv-offloading-size", "1"],
        {"connector": "OffloadingConnector", "role": "kv_both", "extra": {"cpu_bytes_to_use": float(GIB)}},
    ),
}


@pytest.fixture(scope="module")
def answers(drive: Any, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model, common = str(model_dir), ["--skip-tokenizer-init"]
    yaml = tmp_path_factory.mktemp("yaml") / "serve.yaml"
    yaml.write_text("kv-connector: umbp\nkv-transfer-config:\n  kv_connector_extra_config:\n    namespace: team-a\n")
    table = {**FORMS, **CONFLICTS, **UNTOUCHED}
    commands = {name: ["serve", model, *common, *arguments] for name, (arguments, _) in table.items()}
    for name, (arguments, _) in PLACES.items():
        commands[name] = ["serve", model, *common, "--kv-connector", "umbp", *arguments]
    both = {"connectors": [json.loads(NAMED), json.loads(OTHER)]}
    multi = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": both}
    commands["below MultiConnector"] = ["serve", model, *common, "--kv-transfer-config", json.dumps(multi)]
    for name, (outer, inner, _) in BELOW.items():
        both = {"connectors": [{**json.loads(NAMED), **inner}, json.loads(OTHER)]}
        multi = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": both, **outer}
        commands[f"below: {name}"] = ["serve", model, *common, "--kv-transfer-config", json.dumps(multi)]
    commands["sizes disagree"] = [
        *["serve", model, *common, "--kv-offloading-backend", "umbp", "--kv-offloading-size", "4"],
        *["--kv-transfer-config.kv_connector_extra_config.cpu_bytes_to_use", "17"],
    ]
    commands["another connector, silently"] = [
        *["serve", model, *common, "--kv-transfer-config", OTHER, "--kv-offloading-size", "4"],
    ]
    commands["yaml"] = ["serve", model, *common, "--config", str(yaml)]
    commands["yaml overridden"] = [
        *["serve", model, *common, "--config", str(yaml)],
        *["--kv-transfer-config", '{"kv_connector_extra_config":{"namespace":"b"}}'],
    ]
    commands["bench latency"] = ["bench", "latency", "--model", model, *common, "--kv-connector", "umbp"]
    commands["bench throughput"] = ["bench", "throughput", "--model", model, *common, "--kv-connector", "umbp"]
    commands["bench offloading"] = ["bench", "throughput", "--model", model, *common, "--kv-offloading-backend", "umbp"]
    configs = [name for name in commands if name not in CONFLICTS]
    return drive("command_line", {"model": model, "commands": commands, "configs": configs})


def umbp(extra: dict[str, Any]) -> dict[str, Any]:
    return {"connector": "umbp", "role": "kv_both", "extra": extra}


def served(extra: dict[str, Any], where: str = ":8000") -> dict[str, Any]:
    """What ``vllm serve`` makes: the engine is told where its server listens."""
    return umbp({**extra, "serving": where})


@pytest.mark.parametrize("form", FORMS)
def test_every_form_names_the_connector_in_the_engines_configuration(form: str, answers: dict[str, Any]) -> None:
    answer = answers[form]
    assert answer.get("config") == served(FORMS[form][1]), answer
    assert answer["again"] == answer["config"]
    assert answer["offloading_size"] is None


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("offloading")])
def test_the_parsed_namespace_is_complete_by_itself(form: str, answers: dict[str, Any]) -> None:
    # It is pickled for API server processes, which have no parser.
    assert answers[form]["namespace"]["connector"] == "umbp"
    assert answers[form]["namespace"]["role"] == "kv_both"
    assert "kv_connector" not in answers[form]["attributes"]


@pytest.mark.parametrize("form", CONFLICTS)
def test_contradictions_end_in_one_argument_error(form: str, answers: dict[str, Any]) -> None:
    assert set(answers[form]) == {"error"}
    assert answers[form]["error"].startswith("argument --kv-")
    assert CONFLICTS[form][1] in answers[form]["error"]


@pytest.mark.parametrize("form", UNTOUCHED)
def test_who_does_not_name_umbp_gets_what_vllm_gives(form: str, answers: dict[str, Any]) -> None:
    assert answers[form]["config"] == UNTOUCHED[form][1]


def test_two_different_sizes_are_refused(answers: dict[str, Any]) -> None:
    assert "disagree" in answers["sizes disagree"]["refused"]


def test_vllms_own_offloading_still_wins_over_other_connectors(answers: dict[str, Any]) -> None:
    assert answers["another connector, silently"]["config"]["connector"] == "OffloadingConnector"


def test_a_yaml_file_takes_the_flag(answers: dict[str, Any]) -> None:
    assert answers["yaml"]["config"] == served(EXTRA)
    assert answers["yaml overridden"]["config"] == served({"namespace": "b"})


@pytest.mark.parametrize("form", ["bench latency", "bench throughput", "bench offloading"])
def test_the_benchmarks_take_the_flag(form: str, answers: dict[str, Any]) -> None:
    assert answers[form]["config"] == umbp({})


@pytest.mark.parametrize("place", PLACES)
def test_the_engine_hears_where_its_server_listens(place: str, answers: dict[str, Any]) -> None:
    assert answers[place]["config"] == umbp(PLACES[place][1])


def test_the_engine_below_multi_connector_hears_it_too(answers: dict[str, Any]) -> None:
    ours, other = answers["below MultiConnector"]["config"]["extra"]["connectors"]
    assert ours["kv_connector_extra_config"] == {"serving": ":8000"}
    assert other == json.loads(OTHER)


@pytest.mark.parametrize("name", BELOW)
def test_below_multi_connector_the_chosen_policy_stays(name: str, answers: dict[str, Any]) -> None:
    assert answers[f"below: {name}"]["failure_policy"] == BELOW[name][2]
