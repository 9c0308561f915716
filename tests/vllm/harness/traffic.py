"""Random work for an engine: shared prefixes, aborts, resets."""

from __future__ import annotations

import random

from tests.vllm.harness.engine import Harness


def tokens(length: int, first: int = 0) -> list[int]:
    """A prompt of ``length`` tokens that shares no prefix with one of another ``first``."""
    return list(range(first, first + length))


class Traffic:
    """Random requests over a few prompt trees; every decision comes from ``rng``."""

    def __init__(self, engine: Harness, rng: random.Random, max_tokens: int = 8) -> None:
        self.engine = engine
        self.rng = rng
        self.max_tokens = max_tokens
        self.names: list[str] = []
        self.preemptions = 0
        limit = engine.spec.max_model_len - max_tokens - 8
        self._stems = [[rng.randrange(900) for _ in range(limit)] for _ in range(3)]

    def prompt(self) -> list[int]:
        """A stem cut anywhere, and often a few tokens of its own."""
        stem = self.rng.choice(self._stems)
        head = stem[: self.rng.randint(1, len(stem))]
        tail = [self.rng.randrange(900) for _ in range(self.rng.choice((0, 0, 1, 7)))]
        return head + tail

    def add(self) -> str:
        """Add one request."""
        name = self.engine.add(
            self.prompt(),
            self.rng.randint(1, self.max_tokens),
            salt=self.rng.choice((None, None, None, "tenant")),
            lora=self.rng.choice((None, None, None, "adapter")),
            skip_reading=self.rng.random() < 0.05,
        )
        self.names.append(name)
        return name

    def abort(self) -> None:
        """Abort a request that may be anywhere in its life, or over."""
        if self.names:
            name = self.rng.choice(self.names[-8:])
            self.rng.choice((self.engine.abort, self.engine.abort_during_step))(name)

    def act(self) -> None:
        """One random event."""
        chance = self.rng.random()
        if chance < 0.25:
            for _ in range(self.rng.choice((1, 1, 1, 3))):
                self.add()
        elif chance < 0.31:
            self.abort()
        elif chance < 0.35:
            self.engine.reset_prefix_cache()
        elif chance < 0.36:
            self.engine.reset_prefix_cache(connector=True)
        elif chance < 0.38:
            self.engine.drain()
            self.engine.reset_prefix_cache()
        self._step()

    def _step(self) -> None:
        self.engine.step()
        self.preemptions += sum(request.num_preemptions > 0 for request in self.engine.scheduler.running)

    def run(self, steps: int) -> int:
        """That many events, then drain; the external tokens of all requests together."""
        for _ in range(steps):
            self.act()
        self.engine.drain()
        return sum(self.engine.external_tokens(name) for name in self.names)
