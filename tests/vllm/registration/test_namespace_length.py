"""What the longest sequence, and where the configuration comes from, mean for who may share KV."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ModelConfig

from tests.vllm.registration.conftest import CONFIG
from tests.vllm.registration.test_namespace import changed, engine, name_of, setting

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * index for index in range(8)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096, **FACTORS}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "LongRoPE": ({"model_type": "phi3", "rope_parameters": LONGROPE}, 4096),
    "by layer type": ({"rope_parameters": {"full": LONGROPE, "sliding": {"rope_type": "default"}}}, 4096),
    "inside": ({"model_type": "vlm", "text_config": {"rope_parameters": LONGROPE}}, 4096),
    "the limit outside": (
        {"original_max_position_embeddings": 4096, "rope_scaling": {"type": "su", **FACTORS}},
        4096,
    ),
    "Llama 4": ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, 32768),
}


def of_length(config: dict[str, Any], length: int, **fields: Any) -> SimpleNamespace:
    """An engine whose model has the configuration ``config``."""
    made = engine()
    vars(made.model_config).update(
        hf_config=SimpleNamespace(to_dict=lambda: config), max_model_len=length, original_max_model_len=length, **fields
    )
    return made


@pytest.mark.parametrize(("config", "limit"), MODELS.values(), ids=MODELS.keys())
def test_a_length_counts_where_the_model_computes_otherwise_beyond_it(config: dict[str, Any], limit: int) -> None:
    short = name_of(of_length(config, limit))
    long = name_of(of_length(config, limit + 1))
    assert short != long
    assert name_of(of_length(config, limit // 2)) == short
    assert name_of(of_length(config, limit * 2)) == long


@pytest.mark.parametrize("kind", ["default", "yarn", "dynamic"])
def test_of_other_models_it_does_not_count(kind: str) -> None:
    config = {"model_type": "llama", "rope_parameters": {"rope_type": kind, "original_max_position_embeddings": 4096}}
    assert name_of(of_length(config, 4096)) == name_of(of_length(config, 8192)) == name_of(engine())


def test_where_angles_scale_with_the_number_of_positions_the_length_itself_counts() -> None:
    config = {"model_type": "plamo3", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    assert name_of(of_length(config, 4096)) != name_of(of_length(config, 8192))


@pytest.mark.parametrize(("config", "limit"), MODELS.values(), ids=MODELS.keys())
def test_a_length_that_vllm_fits_later_is_not_looked_at(config: dict[str, Any], limit: int) -> None:
    """The model was built before, and every process hears of the new length at another moment."""
    names = set()
    for length in (limit // 2, limit * 2):
        fitted = of_length(config, length, tokenizer="org/model")
        fitted.model_config.original_max_model_len = -1
        names.add(name_of(fitted))
    assert len(names) == 1
    assert names.isdisjoint({name_of(of_length(config, limit)), name_of(of_length(config, limit + 1))})


def test_a_draft_model_is_built_by_the_length_too() -> None:
    names = set()
    for length in (4096, 8192):
        made = engine()
        made.model_config.max_model_len = length
        draft = of_length(MODELS["LongRoPE"][0], 2048).model_config
        made.speculative_config = SimpleNamespace(
            method="eagle", model="org/draft", revision=None, quantization=None, draft_model_config=draft
        )
        names.add(name_of(made))
    assert len(names) == 2


def test_what_the_user_says_of_llama_4_counts_in_place_of_the_length(tmp_path: Path) -> None:
    config = MODELS["Llama 4"][0]

    def told(length: int, tuning: bool | None, model: str = "org/model") -> str:
        overrides = {} if tuning is None else {"attn_temperature_tuning": tuning}
        made = of_length(config, length, override_generation_config=overrides, generation_config="auto")
        made.model_config.model = model
        return name_of(made)

    assert told(4096, tuning=True) == told(65536, tuning=True) != told(4096, tuning=False)
    local = str(tmp_path)
    before = told(4096, None, local)
    (tmp_path / "generation_config.json").write_text(json.dumps({"attn_temperature_tuning": True}))
    assert told(4096, None, local) == told(65536, None, local) != before


def folder(path: Path, **config: Any) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return str(path)


def test_another_models_configuration_counts(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other", rope_theta=5e6)
    plain = engine(one)
    same, another = (changed(lambda config: None) for _ in range(2))
    for config, path in ((same, one), (another, other)):
        config.model_config.model = one
        config.model_config.hf_config_path = path
    assert name_of(same) == name_of(plain)
    assert name_of(another) != name_of(plain)
    before = name_of(another)
    (Path(other) / "config.json").write_text("{}")
    assert name_of(another) != before


def test_the_revision_of_the_code_and_the_form_of_the_configuration_count() -> None:
    def said(**fields: Any) -> str:
        config = engine()
        vars(config.model_config).update({"code_revision": None, "config_format": "auto", **fields})
        return name_of(config)

    assert said() == name_of(engine())
    assert len({said(), said(code_revision="v2"), said(config_format="mistral")}) == 3


def test_how_adapters_are_applied_counts() -> None:
    def said(**fields: Any) -> str:
        config = engine()
        usual = {"target_modules": None, "enable_tower_connector_lora": False, "lora_dtype": "torch.bfloat16"}
        config.lora_config = SimpleNamespace(**{**usual, **fields})
        return name_of(config)

    assert said() == name_of(engine())
    others = [{"target_modules": ["q_proj"]}, {"enable_tower_connector_lora": True}, {"lora_dtype": "torch.float16"}]
    assert len({said(), *(said(**fields) for fields in others)}) == 4


def test_vllms_own_configuration_is_told_by_where_it_comes_from_and_by_its_length(tmp_path: Path) -> None:
    model, other = folder(tmp_path / "one"), folder(tmp_path / "other", rope_theta=5e6)
    long = folder(tmp_path / "long", rope_parameters={**LONGROPE, "original_max_position_embeddings": 128})

    def named(path: str, length: int = 256, **options: Any) -> str:
        made = engine()
        made.model_config = ModelConfig(
            model=path, tokenizer=path, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=length, **options
        )
        return name_of(made)

    assert named(model) == named(model, 128)
    assert named(model, hf_config_path=other) != named(model)
    assert named(long, 64) == named(long, 128) != named(long, 129) == named(long)


def test_the_installed_vllm_has_what_is_asked_for() -> None:
    from vllm.config import LoRAConfig, SpeculativeConfig

    adapted = {field.name for field in dataclasses.fields(LoRAConfig)}
    assert adapted >= {"target_modules", "lora_dtype", "enable_tower_connector_lora"}
    wanted = {"hf_config_path", "code_revision", "config_format", "override_generation_config", "generation_config"}
    assert {field.name for field in dataclasses.fields(ModelConfig)} >= wanted
    assert "draft_model_config" in {field.name for field in dataclasses.fields(SpeculativeConfig)}


def test_setting_a_field_that_is_not_there_is_noticed() -> None:
    with pytest.raises(AssertionError):
        changed(setting("model_config.no_such_field", 1))
