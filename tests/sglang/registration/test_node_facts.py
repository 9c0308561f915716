"""Who a rank is at the master, by what SGLang publishes in its process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.configs.model_config import ModelConfig
from transformers import LlamaConfig, Qwen3NextConfig

from umbp_connectors.config import resolve
from umbp_connectors.reporting.node import node_id_of
from umbp_sglang.node_facts import node_facts, publishes_events


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """What a server's first rank finds; tests change it."""
    parts = {
        "parallel": SimpleNamespace(
            pp_rank=0, attn_tp_rank=0, attn_tp_size=1, attn_cp_rank=0, attn_dp_size=1, attn_dp_rank=0, dp_rank=None
        ),
        "serving": SimpleNamespace(host="10.0.0.7", port=30000, served_model_name="m"),
        "disagg": SimpleNamespace(disaggregation_mode="null"),
        "spec": SimpleNamespace(speculative_algorithm=None),
        "memory": SimpleNamespace(hicache_storage_backend_extra_config=None),
        "server_args": SimpleNamespace(launch_command="python -m sglang.launch_server --model-path m"),
    }
    for name, part in parts.items():
        monkeypatch.setattr(f"sglang.srt.runtime_context.get_{name}", lambda part=part: part)
    return parts


def name(**keys: object) -> str:
    return node_id_of(node_facts("model", 64), resolve(keys, {}).config)


def test_a_server(published: dict[str, Any]) -> None:
    facts = node_facts("model", 64)
    assert (facts.engine, facts.model, facts.host, facts.port, facts.role) == ("sglang", "m", "10.0.0.7", 30000, "both")
    own = {"block": "64", "hash": "sglang", "hash_form": "int64", "hash_start": "default", "min_load": "4"}
    assert facts.tags == own
    assert name() == "10.0.0.7:30000:dp0:pp0:tp0"
    assert not facts.several
    assert publishes_events()


@pytest.mark.parametrize(
    ("extra", "least"),
    [
        (None, "4"),
        ('{"prefetch_threshold": 65}', "2"),
        ('{"prefetch_threshold": 64}', None),
        ("@/no/such/file.json", None),
    ],
)
def test_what_is_too_short_to_be_read(published: dict[str, Any], extra: str | None, least: str | None) -> None:
    """SGLang counts tokens, 256 by default; the tag counts pages."""
    published["memory"].hicache_storage_backend_extra_config = extra
    assert node_facts("model", 64).tags.get("min_load") == least


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_a_server_on_all_addresses_has_that_of_its_machine(
    published: dict[str, Any], monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    published["serving"].host = host
    monkeypatch.setenv("SGLANG_HOST_IP", "192.168.1.9")
    assert node_facts("model", 64).host == "192.168.1.9"


@pytest.mark.parametrize("started", ["Engine(model_path='m')", None])
def test_an_engine_without_a_server_has_its_process(published: dict[str, Any], started: str | None) -> None:
    """Its port is a default that nobody listens on, and another engine of the machine has the same."""
    published["server_args"].launch_command = started
    assert node_facts("model", 64).port is None
    assert ":pid" in name()


def test_ranks_are_told_apart(published: dict[str, Any]) -> None:
    parallel = published["parallel"]
    parallel.tp_size, parallel.pp_size = 4, 2
    found = set()
    for cp in range(2):
        for tp in range(2):
            parallel.pp_rank, parallel.attn_cp_rank, parallel.attn_tp_rank, parallel.attn_tp_size = 1, cp, tp, 2
            found.add(name(node_id="mine"))
            assert not publishes_events()
    assert found == {f"mine:dp0:pp1:tp{rank}" for rank in range(4)}


def test_caches_that_are_independent_are_told_apart(published: dict[str, Any]) -> None:
    parallel = published["parallel"]
    parallel.dp_rank = 3
    assert name().endswith(":dp3:pp0:tp0")
    parallel.attn_dp_size, parallel.attn_dp_rank = 2, 1
    assert name().endswith(":dp1:pp0:tp0")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_disaggregated_server_says_its_role(published: dict[str, Any], role: str) -> None:
    published["disagg"].disaggregation_mode = role
    assert name().endswith(f":tp0:{role}")


def test_pairs_of_tokens_are_said(published: dict[str, Any]) -> None:
    published["spec"].speculative_algorithm = "EAGLE"
    assert node_facts("model", 64).tags["hash_unit"] == "bigram"


@pytest.mark.parametrize(
    ("kind", "more", "tails", "unit"),
    [
        (LlamaConfig, {}, None, "bigram"),
        (LlamaConfig, {"is_hybrid_swa": True, "sliding_window": 64}, "unknown", "bigram"),
        (Qwen3NextConfig, {}, "unknown", None),
    ],
    ids=["full attention", "windows", "states"],
)
def test_layers_of_which_nothing_is_told_are_said(
    published: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: Any,
    more: Any,
    tails: str | None,
    unit: str | None,
) -> None:
    """With EAGLE a model with states keeps pages of tokens, as SGLang's trees do."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    architecture = kind.__name__.replace("Config", "ForCausalLM")
    kind(architectures=[architecture], head_dim=32, **sizes, **more).save_pretrained(tmp_path)
    model = ModelConfig(model_path=str(tmp_path), dtype="float32")
    monkeypatch.setattr("sglang.srt.runtime_context.process_model_config", lambda: model)
    assert node_facts("model", 64).tags.get("tails") == tails
    published["spec"].speculative_algorithm = "EAGLE"
    assert node_facts("model", 64).tags.get("hash_unit") == unit


def test_outside_of_a_server_the_rank_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise ValueError("not published")

    for part in ("parallel", "serving", "disagg", "spec", "server_args"):
        monkeypatch.setattr(f"sglang.srt.runtime_context.get_{part}", nothing)
    facts = node_facts("model", 64)
    assert (facts.model, facts.port, facts.dp, facts.pp, facts.tp) == ("model", None, 0, 0, 0)
    assert publishes_events()
