"""A model whose KV at every position is a function of the whole token prefix, so that wrong KV shows itself.

The state of position ``p`` mixes the state of ``p - 1`` with token ``p``; it starts from the request's
extra keys (LoRA, cache salt) and takes in the identifiers of multimodal items where they lie.  The KV bytes
of a layer are an expansion of that state, the layer's name and the TP rank.  Equal bytes therefore mean an
equal prefix, and a block that was moved, mixed up, overwritten or never filled is recognised.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.vllm.harness.spec import VOCABULARY

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SAMPLE_SALT = 0x5851F42D4C957F2D

States = npt.NDArray[np.uint64]


def mix(value: int) -> int:
    """Splitmix64's finaliser: one 64-bit word to another, every bit depending on every bit."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: States) -> States:
    with np.errstate(over="ignore"):
        values = values + np.uint64(_GOLDEN)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def seed_of(text: str) -> int:
    """A 64-bit word for a name."""
    raw = text.encode()
    return mix((zlib.crc32(raw) << 32) | zlib.adler32(raw))


def next_token(state: int) -> int:
    """The token that the model samples after a prefix with this state."""
    return mix(state ^ _SAMPLE_SALT) % VOCABULARY


@dataclass
class Prefix:
    """The tokens of one request and the model's state after each of them."""

    start: int = 0
    """State before the first token: what LoRA and cache salt make of it."""
    media: dict[int, int] = field(default_factory=dict)
    """Position -> word of the multimodal item that lies there."""
    tokens: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        state = self.states[-1] if self.states else self.start
        for token in tokens:
            word = token ^ self.media.get(len(self.tokens), 0)
            state = mix(state ^ mix(word))
            self.tokens.append(token)
            self.states.append(state)

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""
        del self.tokens[length:]
        del self.states[length:]

    def copy(self) -> Prefix:
        """An independent copy."""
        return Prefix(self.start, dict(self.media), list(self.tokens), list(self.states))

    def slice(self, start: int, end: int) -> States:
        """The states of positions ``[start, end)``."""
        return np.array(self.states[start:end], dtype=np.uint64)


def start_state(salt: str | None, lora: str | None) -> int:
    """The state before the first token."""
    return mix(seed_of(f"salt {salt}") ^ seed_of(f"lora {lora}"))


def kv_bytes(states: States, layer_seed: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The KV bytes of one layer at positions with these states; shape ``(len(states), nbytes)``."""
    words = -(-nbytes // 8)
    steps = np.arange(1, words + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        grid = (states ^ np.uint64(layer_seed))[:, None] + steps[None, :] * np.uint64(_GOLDEN)
    return _mix_array(grid).view(np.uint8).reshape(len(states), words * 8)[:, :nbytes]


def expected_output(prompt: Sequence[int], count: int, salt: str | None = None, lora: str | None = None) -> list[int]:
    """The tokens that the model gives for ``prompt``, without any engine."""
    prefix = Prefix(start_state(salt, lora))
    prefix.extend(prompt)
    for _ in range(count):
        prefix.extend([next_token(prefix.states[-1])])
    return prefix.tokens[len(prompt) :]
