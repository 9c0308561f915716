"""What of the longest sequence that an engine takes changes the KV of some models.

Most models compute the same KV at every ``max_model_len``.  LongRoPE and Llama 4 choose how they compute by comparing
it with a number of theirs, and where rotary embeddings get their size from it, some kinds scale with it.  Only these
facts count, and only for those models: never the length itself, which an engine of another size may have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from umbp_vllm import compat

LLAMA4_TUNING = "attn_temperature_tuning"
_LLAMA4 = frozenset({"llama4", "llama4_text"})
_LLAMA4_LONG = 32768
_LONGROPE = frozenset({"longrope", "su"})
_SIZED_BY_LENGTH = frozenset({"plamo3", "minimax_m2", "cohere_compass", "muse_spark", "muse_spark_text"})
"""Model types that give their rotary embedding the length as its number of positions."""
_SCALED_BY_SIZE = _LONGROPE | {"dynamic"}
"""Kinds of rotary embedding whose angles depend on that number."""
_AUTO_FIT = -1
_NO_FILE = frozenset({"auto", "vllm"})


def length_facts(model: Any, *others: Any) -> dict[str, object]:
    """What follows from the length of ``model`` (vLLM's ``ModelConfig``) for its KV; empty for most models.

    ``others`` are the configurations whose length the model may be built with as well: the target's, for a draft model.
    """
    config = compat.optional(model, "hf_config")
    if config is None:
        return {}
    parts = list(_parts(config.to_dict()))
    types = {part["model_type"] for part in parts if isinstance(part.get("model_type"), str)}
    ropes = [part for part in parts if _rope_type(part) is not None]
    lengths = [_built_length(each) for each in (model, *others)]
    facts: dict[str, object] = {}
    limits = {_limit(rope) for rope in ropes if _rope_type(rope) in _LONGROPE}
    if limits:
        known = sorted(limit for limit in limits if limit is not None)
        beyond = [_beyond(length, limit) for limit in known for length in lengths]
        facts["long_rope"] = [*beyond, *(lengths if None in limits else [])]
    scaled = any(_rope_type(rope) in _SCALED_BY_SIZE or rope.get("use_fope") for rope in ropes)
    if scaled and not types.isdisjoint(_SIZED_BY_LENGTH):
        facts["positions"] = lengths
    if not types.isdisjoint(_LLAMA4):
        facts["llama4_tuning"] = _llama4_tuning(model, lengths)
    return facts


def _built_length(model: Any) -> int | str:
    """The length that the model is built with, or a text that stands for it.

    With ``--max-model-len auto`` vLLM builds the model for the length that its files say, and shortens the
    configuration later; that length follows from the model and the tokenizer.
    """
    if compat.optional(model, "original_max_model_len") != _AUTO_FIT:
        return int(model.max_model_len)
    tokenizer = compat.optional(model, "tokenizer")
    return "auto" if tokenizer == model.model else f"auto {tokenizer}"


def _beyond(length: int | str, limit: int) -> bool | str:
    return length if isinstance(length, str) else length > limit


def _llama4_tuning(model: Any, lengths: list[int | str]) -> object:
    """What vLLM takes: the user's word, then the generation configuration's, then what follows from the length."""
    told = {**_generation_config(model), **(compat.optional(model, "override_generation_config") or {})}
    if LLAMA4_TUNING in told:
        return str(told[LLAMA4_TUNING])
    source = compat.optional(model, "generation_config", "auto")
    return [_beyond(length, _LLAMA4_LONG) for length in lengths] + ([] if source in _NO_FILE else [str(source)])


def _generation_config(model: Any) -> Mapping[str, Any]:
    """The generation configuration of a local folder; of a hub's repository the commit tells it."""
    source = compat.optional(model, "generation_config", "auto")
    folder = (compat.optional(model, "hf_config_path") or model.model) if source in _NO_FILE else source
    try:
        told = json.loads((Path(folder) / "generation_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _parts(config: Mapping[str, Any], outer: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """``config`` and every mapping inside it, each with the positions that the one around it was trained for."""
    own = dict(config)
    if outer is not None:
        own.setdefault("original_max_position_embeddings", outer.get("original_max_position_embeddings"))
    yield own
    for inner in config.values():
        if isinstance(inner, Mapping):
            yield from _parts(inner, own)


def _rope_type(part: Mapping[str, Any]) -> str | None:
    told = part.get("rope_type", part.get("type"))
    return told if isinstance(told, str) else None


def _limit(rope: Mapping[str, Any]) -> int | None:
    told = rope.get("original_max_position_embeddings")
    return None if told is None else int(told)
