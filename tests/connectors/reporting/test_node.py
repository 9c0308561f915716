"""Who a reporting engine says it is, and whether it reports at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.master.app.master_process import ROOT, environment
from umbp_connectors.config import resolve
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.reporting.node import NodeFacts, node_id_of, registration_of
from umbp_connectors.reporting.opening import open_reporter
from umbp_core.errors import ConfigError

FACTS = NodeFacts("vllm", "meta/llama", "0.32.0", "both", "10.0.0.7", 8000)
ADDRESS = "umbp://127.0.0.1:1"


def config_of(**keys: object) -> UmbpConfig:
    return resolve(keys, {}).config


@pytest.mark.parametrize(
    ("facts", "keys", "name"),
    [
        (FACTS, {}, "10.0.0.7:8000:dp0:pp0:tp0"),
        (replace(FACTS, dp=3, tp=1, pp=2), {}, "10.0.0.7:8000:dp3:pp2:tp1"),
        (replace(FACTS, role="prefill"), {}, "10.0.0.7:8000:dp0:pp0:tp0:prefill"),
        (replace(FACTS, role="decode", dp=1), {}, "10.0.0.7:8000:dp1:pp0:tp0:decode"),
        (replace(FACTS, port=None), {}, "10.0.0.7:pid{pid}:dp0:pp0:tp0"),
        (replace(FACTS, host="127.0.0.1"), {}, "{host}:8000:dp0:pp0:tp0"),
        (replace(FACTS, host="localhost"), {}, "{host}:8000:dp0:pp0:tp0"),
        (replace(FACTS, host="::1", port=None), {}, "{host}:pid{pid}:dp0:pp0:tp0"),
        (FACTS, {"node_id": "gpu-1"}, "gpu-1"),
        (replace(FACTS, role="prefill"), {"node_id": "gpu-1"}, "gpu-1"),
        (replace(FACTS, several=True, dp=2), {"node_id": "gpu-1"}, "gpu-1:dp2:pp0:tp0"),
    ],
)
def test_the_name_says_where_the_engine_is(facts: NodeFacts, keys: dict[str, object], name: str) -> None:
    assert node_id_of(facts, config_of(**keys)) == name.format(host=socket.gethostname(), pid=os.getpid())


def test_ranks_that_report_have_names_of_their_own() -> None:
    ranks = [replace(FACTS, dp=dp, pp=pp, tp=tp, several=True) for dp in (0, 1) for pp in (0, 1) for tp in (0, 1)]
    for keys in ({}, {"node_id": "gpu-1"}):
        assert len({node_id_of(facts, config_of(**keys)) for facts in ranks}) == len(ranks)


def test_the_registration_has_the_tags_that_routers_and_dashboards_need() -> None:
    facts = replace(FACTS, role="decode", dp=1, tags={"block": "16", "hash": "sha256"})
    registration = registration_of(facts, config_of(node_tags="zone=a, role=other", node_address="gpu-1.example"))
    assert registration.node_id == "10.0.0.7:8000:dp1:pp0:tp0:decode"
    assert registration.node_address == "gpu-1.example"
    assert registration.peer_address == ""
    assert registration.incarnation == 0
    assert sorted(registration.tags) == [
        "block=16",
        "dp=1",
        "engine=vllm",
        "hash=sha256",
        "http=10.0.0.7:8000",
        "model=meta/llama",
        "pp=0",
        "role=other",
        "tp=0",
        "version=0.32.0",
        "zone=a",
    ]


def test_loads_that_are_too_short_are_said() -> None:
    """Whoever explains what is reused has to know; an engine with a limit of its own says that."""
    config = config_of(min_load_blocks=3)
    assert "min_load=3" in registration_of(FACTS, config).tags
    assert "min_load=4" in registration_of(replace(FACTS, tags={"min_load": "4"}), config).tags


def test_an_address_of_version_6_stands_in_brackets_where_a_port_follows() -> None:
    registration = registration_of(replace(FACTS, host="fd00::7"), config_of())
    assert "http=[fd00::7]:8000" in registration.tags
    assert registration.node_address == "fd00::7"


def test_an_engine_without_a_server_has_no_door() -> None:
    assert not any(tag.startswith("http=") for tag in registration_of(replace(FACTS, port=None), config_of()).tags)


@pytest.mark.parametrize("keys", [{}, {"master_address": ADDRESS, "report": False}, {"report": True}])
def test_nobody_is_told_without_a_master_or_without_a_wish(keys: dict[str, object]) -> None:
    assert open_reporter(config_of(**keys), FACTS) is None


def test_the_environment_turns_it_off() -> None:
    env = {"UMBP_MASTER_ADDRESS": ADDRESS, "UMBP_REPORT": "0"}
    assert open_reporter(resolve({}, env).config, FACTS) is None
    assert open_reporter(resolve({}, env | {"UMBP_REPORT": "1"}).config, FACTS) is not None


def test_a_token_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_file"):
        open_reporter(config_of(master_address=ADDRESS, master_token_file=str(tmp_path / "none")), FACTS)
    with pytest.raises(ConfigError, match="master_token cannot be used"):
        open_reporter(config_of(master_address=ADDRESS, master_token="two words"), FACTS)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"master_address": "http://x:1"}, "unknown scheme 'http'"),
        ({"master_address": "x"}, "no host and port of a master"),
        ({"node_tags": "role"}, "'role' is no tag; give NAME=VALUE"),
        ({"node_tags": "=x"}, "'=x' is no tag"),
        ({"master_client_cert": "c.pem"}, "come together"),
        ({"report_interval_ms": -1}, "report_interval_ms"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(keys: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**keys)
    assert sentence in str(caught.value)


LOADED = """
import sys
from umbp_connectors.config import resolve
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.opening import open_reporter
config = resolve({{"master_address": {address!r}}}, {{}}).config
reporter = open_reporter(config, NodeFacts("vllm", "m", "1", "both", "h", 1))
print(reporter is not None, "grpc" in sys.modules)
"""


@pytest.mark.parametrize("address", [ADDRESS, "umbp+unix:///none", "grpc://127.0.0.1:1"])
def test_a_reporter_that_is_not_started_needs_no_grpc(tmp_path: Path, address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(address=address)],
        env=environment(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["True", "False"]
