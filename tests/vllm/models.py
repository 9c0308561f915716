"""Random-weight models and a byte-level tokenizer, made on the spot and offline.

Each maker writes a Hugging Face folder (``config.json``, ``model.safetensors``, tokenizer) that vLLM loads as it
would load any other model.  The weights follow from the seed alone, so that two processes that make the same model
compute the same tokens.

Ordinary random initialisation makes bad test models: attention is close to a plain average and the next token hardly
depends on anything but the last one, so that a test passes on wrong KV.  Therefore ``_randomise`` draws weights whose
attention is sharp and whose logits are spread: a greedy token depends on the whole prompt, and the best logit leads
the second by far more than the rounding that separates a prefill in one chunk from the same prefill in two.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

VOCABULARY = 320
"""Rows of the embedding; ids 0 to 255 are the bytes, 256 is the end of the text, the rest is never a prompt token."""

END_OF_TEXT = 256

_SHARP = 3.0
"""Gain on query and key projections; attention scores then have a deviation of about nine."""


def tiny_llama(folder: Path, *, seed: int = 0, layers: int = 4) -> Path:
    """A Llama of about 0.6 M parameters: 2 KiB of float32 KV per token, one KV group.  Returns ``folder``."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        **_shared(),
    )
    return _write(LlamaForCausalLM, config, folder, seed)


def medium_llama(folder: Path, *, seed: int = 0) -> Path:
    """A Llama of about 190 M parameters for time measurements: 32 KiB of bfloat16 KV per token."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=16384,
        **_shared(),
    )
    return _write(LlamaForCausalLM, config, folder, seed, dtype=torch.bfloat16)


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
        **_shared(),
    )
    return _write(DeepseekV2ForCausalLM, config, folder, seed)


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
        **_shared(),
    )
    return _write(Gemma3ForCausalLM, config, folder, seed)


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
        **_shared(),
    )
    return _write(Qwen3NextForCausalLM, config, folder, seed)


def tiny_lora(folder: Path, *, seed: int = 1, layers: int = 4) -> Path:
    """A rank-8 LoRA adapter of :func:`tiny_llama` that changes its tokens.  Returns ``folder``."""
    from safetensors.torch import save_file

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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without merges: token ``i`` is byte ``i`` in the order of the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary["<|end|>"] = END_OF_TEXT
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def prompt(length: int, *, seed: int) -> list[int]:
    """``length`` random token ids; different seeds differ from the first block on."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def _shared() -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
    }


def _write(
    kind: type[PreTrainedModel], config: object, folder: Path, seed: int, dtype: torch.dtype = torch.float32
) -> Path:
    with torch.device("meta"):
        model = kind(config)
    model = model.to_empty(device="cpu").to(dtype)
    model.tie_weights()
    _randomise(model, seed)
    folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter from ``seed`` (see the module's docstring for the distribution)."""
    generator = torch.Generator().manual_seed(seed)
    gemma = isinstance(model, Gemma3ForCausalLM)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.fill_(-4.0)  # a recurrent state that forgets slowly
        elif parameter.ndim < 2:
            parameter.fill_(0.0 if gemma or name.endswith("bias") else 1.0)  # Gemma's norms scale by one plus this
        else:
            parameter.copy_(_matrix(name, parameter, generator, gemma))


def _matrix(name: str, like: torch.Tensor, generator: torch.Generator, gemma: bool) -> torch.Tensor:
    values = torch.randn(like.shape, generator=generator)
    if name.endswith("embed_tokens.weight"):  # Gemma multiplies what it looks up by the root of the hidden size
        return values / math.sqrt(like.shape[1]) if gemma else values
    if name.endswith("lm_head.weight"):
        values *= torch.randn(like.shape[0], 1, generator=generator).exp()
        values[256:] = 0.0
    sharp = any(part in name for part in ("q_proj", "k_proj", "kv_a_proj"))
    return values * ((_SHARP if sharp else 1.0) / math.sqrt(like[0].numel()))
