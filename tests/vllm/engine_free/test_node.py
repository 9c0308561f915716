"""What an engine's node says of itself, from vLLM's configuration."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.harness import EngineSpec
from tests.vllm.harness.spec import make_vllm_config
from umbp_connectors.config import resolve
from umbp_connectors.reporting.node import NodeFacts, node_id_of
from umbp_vllm import compat
from umbp_vllm.groups import KvGroup
from umbp_vllm.node import facts_of, hash_tags

FULL = [KvGroup(0, 16, 1, None, None, False)]
CONFIG = resolve().config


def facts(serving: str | None = "10.0.0.7:8000", engines: int = 1, rank: int = 0, **spec: Any) -> NodeFacts:
    extra = {} if serving is None else {"serving": serving}
    return facts_of(make_vllm_config(EngineSpec("umbp", extra=extra, **spec)), FULL, 16, engines, rank)


@pytest.mark.parametrize(
    ("kv_role", "role", "ending"),
    [("kv_both", "both", ""), ("kv_producer", "prefill", ":prefill"), ("kv_consumer", "decode", ":decode")],
)
def test_the_role_is_what_the_engine_stores_and_loads(kv_role: str, role: str, ending: str) -> None:
    made = facts(kv_role=kv_role)
    assert made.role == role
    assert node_id_of(made, CONFIG) == f"10.0.0.7:8000:dp0:pp0:tp0{ending}"


@pytest.mark.parametrize(
    ("serving", "host", "port"),
    [
        ("10.0.0.7:8000", "10.0.0.7", 8000),
        ("::1:8000", "::1", 8000),
        (":8000", "192.0.2.3", 8000),
        ("0.0.0.0:81", "192.0.2.3", 81),
        (":::81", "192.0.2.3", 81),
        ("somewhere", "192.0.2.3", None),
        (None, "192.0.2.3", None),
    ],
)
def test_where_the_engine_is_asked(
    monkeypatch: pytest.MonkeyPatch, serving: str | None, host: str, port: int | None
) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.3")
    made = facts(serving)
    assert (made.host, made.port) == (host, port)


def test_a_machine_without_an_address_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "0.0.0.0")
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    assert facts(None).host == "box"


@pytest.mark.statement("connector", 86)
def test_each_data_parallel_engine_is_a_node() -> None:
    named = resolve(extra={"node_id": "mine"}).config
    nodes = [facts(engines=2, rank=rank) for rank in range(2)]
    assert [node_id_of(node, CONFIG) for node in nodes] == [f"10.0.0.7:8000:dp{rank}:pp0:tp0" for rank in range(2)]
    assert [node_id_of(node, named) for node in nodes] == [f"mine:dp{rank}:pp0:tp0" for rank in range(2)]
    assert node_id_of(facts(), named) == "mine"


def test_the_model_is_named_as_requests_name_it() -> None:
    config = make_vllm_config(EngineSpec("umbp"))
    config.model_config.served_model_name = ["chat", "other"]
    assert facts_of(config, FULL, 16, 1, 0).model == "chat"
    config.model_config.served_model_name = None
    assert facts_of(config, FULL, 16, 1, 0).model == config.model_config.model


@pytest.mark.parametrize(
    ("algorithm", "env", "version", "start", "keys"),
    [
        ("sha256", {}, "0.32.0", "default", "tagged"),
        ("sha256_cbor", {"PYTHONHASHSEED": "0"}, "0.32.0", "seed", "tagged"),
        ("sha256", {}, "0.28.0", "random", "untagged"),
        ("xxhash", {}, "0.30.0", "random", "untagged"),
        ("xxhash_cbor", {"PYTHONHASHSEED": "7"}, "0.31.0", "seed", "tagged"),
    ],
)
def test_tags_say_how_hashes_are_computed(
    algorithm: str, env: dict[str, str], version: str, start: str, keys: str
) -> None:
    config = make_vllm_config(EngineSpec("umbp"))
    config.cache_config.prefix_caching_hash_algo = algorithm
    assert hash_tags(config, FULL, 16, env, version) == {
        "block": "16",
        "hash": algorithm,
        "hash_form": "int64",
        "hash_start": start,
        "hash_keys": keys,
    }


def test_a_tag_says_that_not_every_hash_names_a_block() -> None:
    config = make_vllm_config(EngineSpec("umbp"))
    longer = [KvGroup(0, 32, 2, None, None, False), KvGroup(1, 16, 1, 63, None, False)]
    assert hash_tags(config, longer, 16, {})["hash_every"] == "2"
    assert "hash_every" not in hash_tags(config, [*FULL, *longer[1:]], 16, {})


def test_a_tag_says_that_a_hit_needs_more_than_is_told() -> None:
    config = make_vllm_config(EngineSpec("umbp"))
    assert "tails" not in hash_tags(config, FULL, 16, {})
    for other in (KvGroup(1, 16, 1, 63, None, False), KvGroup(1, 16, 1, None, 512, False)):
        assert (
            hash_tags(config, [*FULL, other], 16, {})["tails"]
            == hash_tags(config, [other], 16, {})["tails"]
            == "unknown"
        )


def test_the_version_is_vllms() -> None:
    assert facts().version == compat.vllm_version()
