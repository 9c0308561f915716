"""Random-weight Llamas and a byte-level tokenizer, made on the spot and offline.

The folder that is written (``config.json``, ``model.safetensors``, tokenizer) loads like any other model.  The weights
follow from the seed alone, so that two processes that make the same model compute the same tokens.

Ordinary random initialisation would be a poor witness: attention is close to a plain average and the next token hardly
depends on anything but the last one, so that tokens agree even when the KV is wrong.  Therefore ``_randomise`` draws
weights whose attention is sharp and whose logits are spread: a greedy token depends on the whole prompt, and the best
logit leads the second by far more than the rounding that separates a prefill in one chunk from the same prefill in two.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VOCABULARY = 320
"""Rows of the embedding; ids 0 to 255 are the bytes, 256 is the end of the text, the rest is never a prompt token."""

END_OF_TEXT = 256

TOKEN_SETTINGS = {
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": END_OF_TEXT,
}
"""What the configuration of every model that goes with :func:`byte_tokenizer` has in common."""

_SHARP = 3.0
"""Gain on query and key projections; attention scores then have a deviation of about nine."""


def tiny_llama(folder: Path, *, seed: int = 0, layers: int = 4) -> Path:
    """A Llama of about 0.6 M parameters: 2 KiB of float32 KV per token.  Returns ``folder``."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        **TOKEN_SETTINGS,
    )
    return write_model(LlamaForCausalLM, config, folder, seed=seed)


def medium_llama(folder: Path, *, seed: int = 0) -> Path:
    """A Llama of about 190 M parameters: 24 KiB of bfloat16 KV per token.  Returns ``folder``."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=16384,
        **TOKEN_SETTINGS,
    )
    return write_model(LlamaForCausalLM, config, folder, seed=seed, dtype=torch.bfloat16)


def write_model(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    folder: Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a model of class ``kind`` with weights drawn from ``seed``, and its tokenizer.  Returns ``folder``."""
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


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter from ``seed`` (see the module's docstring for the distribution)."""
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")
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
