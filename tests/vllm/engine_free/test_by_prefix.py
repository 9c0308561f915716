"""Models in which equal beginnings do not serve each other: vLLM turns its own prefix caching off, and so do we."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.spec import EngineSpec, GroupSpec, make_vllm_config
from tests.vllm.harness.traffic import tokens
from umbp_core.tiers import Tier
from umbp_vllm import compat


def test_a_model_whose_tokens_see_what_comes_after_them_keeps_nothing(
    make_umbp: MakeUmbp, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_umbp({"log_level": "warning"}, groups=(GroupSpec(non_causal=True),), prefix_caching=False)
    for _ in range(2):
        request = engine.add(tokens(24), max_tokens=2)
        engine.drain()
        assert engine.external_tokens(request) == 0
    assert not engine.idle_objects(Tier.DRAM)
    engine.close()
    assert "nothing is stored or loaded for this model: its attention sees" in caplog.text


@pytest.mark.parametrize(
    ("runner", "supported", "keeps"), [("generate", False, True), ("pooling", True, True), ("pooling", False, False)]
)
def test_a_pooler_that_needs_every_token_gets_them(runner: str, supported: bool, keeps: bool) -> None:
    model = SimpleNamespace(runner_type=runner, is_prefix_caching_supported=supported)
    reason = compat.why_not_by_prefix(SimpleNamespace(model_config=model), [])
    assert (reason is None) is keeps


def test_vllm_says_what_is_asked_for() -> None:
    """Under another name it would be taken for a model of which nothing is to be feared."""
    model = make_vllm_config(EngineSpec("umbp")).model_config
    assert (model.runner_type, model.is_prefix_caching_supported) == ("generate", True)
    assert "non_causal" in FullAttentionSpec.__dataclass_fields__


@pytest.mark.parametrize(
    ("second", "zeroing", "early"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_blocks_are_cleared_early_by_the_second_runner_alone(second: bool, zeroing: bool, early: bool) -> None:
    config, kv_config = SimpleNamespace(use_v2_model_runner=second), SimpleNamespace(needs_kv_cache_zeroing=zeroing)
    assert compat.clears_before_fences(config, kv_config) is early
    assert compat.clears_before_fences(_Old(), _Old()) is False


class _Old:
    """A vLLM without either."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)
