"""Tiny random-weight models of every kind of KV that the connector meets, made on the spot and offline.

How the weights are drawn, and why so, is said in ``examples/random_model.py``; ``medium_llama``, ``tiny_llama`` and
``prompt`` are its, and named here for the tests' convenience.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from examples.random_model import TOKEN_SETTINGS, medium_llama, prompt, tiny_llama, write_model

__all__ = [
    "medium_llama",
    "prompt",
    "tiny_eagle",
    "tiny_linear_attention",
    "tiny_llama",
    "tiny_lora",
    "tiny_mla",
    "tiny_sliding_window",
]


def tiny_mla(folder: Path, *, seed: int = 0) -> Path:
    """A DeepSeek-V2 with dense layers only: one latent KV vector of 576 numbers per token and layer."""
    config = DeepseekV2Config(
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=2,
        max_position_embeddings=4096,
        **TOKEN_SETTINGS,
    )
    return write_model(DeepseekV2ForCausalLM, config, folder, seed=seed)


def tiny_sliding_window(folder: Path, *, seed: int = 0, window: int = 128) -> Path:
    """A Gemma 3 with four sliding-window layers and two full ones: three KV groups that share the same bytes."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=window,
        layer_types=kinds,
        max_position_embeddings=4096,
        **TOKEN_SETTINGS,
    )
    return write_model(Gemma3ForCausalLM, config, folder, seed=seed)


def tiny_linear_attention(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen3-Next with three gated-delta-net layers and one attention layer: recurrent state beside the KV."""
    config = Qwen3NextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        max_position_embeddings=4096,
        **TOKEN_SETTINGS,
    )
    return write_model(Qwen3NextForCausalLM, config, folder, seed=seed)


def tiny_lora(folder: Path, *, seed: int = 1, layers: int = 4) -> Path:
    """A rank-8 LoRA adapter of :func:`tiny_llama` that changes its tokens.  Returns ``folder``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, rows in (("q_proj", 128), ("v_proj", 64)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(8, 128, generator=generator) / math.sqrt(128)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 8, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def tiny_eagle(folder: Path, *, seed: int = 2) -> Path:
    """An EAGLE head for :func:`tiny_llama`: one layer, whose drafts are never right.  Returns ``folder``."""
    hidden, inner, queries, keys = 128, 256, 128, 64
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "fc": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj": (queries, hidden),
        "layers.0.self_attn.k_proj": (keys, hidden),
        "layers.0.self_attn.v_proj": (keys, hidden),
        "layers.0.self_attn.o_proj": (hidden, queries),
        "layers.0.mlp.gate_proj": (inner, hidden),
        "layers.0.mlp.up_proj": (inner, hidden),
        "layers.0.mlp.down_proj": (hidden, inner),
    }
    tensors = {
        f"{name}.weight": torch.randn(*shape, generator=generator) / math.sqrt(shape[1])
        for name, shape in shapes.items()
    }
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        dtype="float32",
        **TOKEN_SETTINGS,
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    return folder
