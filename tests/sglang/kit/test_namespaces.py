"""Who may see whose pages: not a request of another namespace, model, layout, rank or type, over the same folder."""

from __future__ import annotations

import pytest

from tests.sglang.kit.conftest import World
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.rig import Backend, Setup
from tests.sglang.kit.shapes import FULL, prompt_of

TOKENS = prompt_of(FULL, 8).tokens
NAMESPACES = [
    Prompt(TOKENS),
    Prompt(TOKENS, extra_key="a"),
    Prompt(TOKENS, cache_salt="a"),
    Prompt(TOKENS, extra_key="a", cache_salt="a"),
    Prompt(TOKENS, extra_key=""),
    Prompt(TOKENS, extra_key="aa"),
]


@pytest.mark.parametrize("memory", ["cache", "buffer_only"])
def test_requests_of_other_namespaces_find_nothing(world: World, backend: Backend, memory: str) -> None:
    engine = world.engine(Setup(backend, FULL, memory=memory))
    for prompt in NAMESPACES:
        engine.flush()
        assert engine.prefetch(prompt) == 0, "found before it was stored"
        engine.compute(prompt)
        engine.offload(prompt)
    for prompt in NAMESPACES:
        engine.flush()
        assert engine.prefetch(prompt) == len(prompt)
        engine.onboard(prompt)
        assert engine.check_device(prompt) == len(prompt) * 8
