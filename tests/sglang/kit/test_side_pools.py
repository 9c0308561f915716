"""Pools beside the main one: what can be restored is what all of them have, and no more is said to exist."""

from __future__ import annotations

import pytest

from tests.sglang.kit.conftest import World
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.rig import Backend, Engine, Setup
from tests.sglang.kit.shapes import MAMBA, SWA, branch, prompt_of

PAGE = SWA.page_size


def restored(engine: Engine, prompt: Prompt) -> int:
    """Pages that come back from storage; all that is in the pools then is what belongs there."""
    tokens = engine.prefetch(prompt)
    engine.check_host(prompt)
    engine.onboard(prompt)
    engine.check_device(prompt)
    engine.flush()
    return tokens // PAGE


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
def test_a_window_serves_the_ends_that_it_covers(world: World, backend: Backend, layout: str) -> None:
    """The window is two pages; of 12 pages the last five have one, so prefixes of 9 pages and more are whole."""
    engine = world.engine(Setup(backend, SWA, layout))
    prompt = prompt_of(SWA, 12)
    engine.compute(prompt, window_from=7 * PAGE)
    engine.offload(prompt)
    engine.flush()
    assert restored(engine, prompt) == 12
    assert {pages: restored(engine, branch(prompt, pages)) for pages in range(5, 12)} == {
        5: 0,
        6: 0,
        7: 0,
        8: 0,
        9: 9,
        10: 10,
        11: 11,
    }


def test_a_state_serves_the_ends_where_it_was_kept(world: World, backend: Backend) -> None:
    """States were kept after 6 and after 12 pages; in between the shorter one serves."""
    engine = world.engine(Setup(backend, MAMBA, "page_first_direct"))
    prompt = prompt_of(MAMBA, 12)
    for part in (prompt.cut(6 * PAGE), prompt):
        engine.compute(part)
        engine.offload(part)
    engine.flush()
    assert {pages: restored(engine, branch(prompt, pages)) for pages in (4, 6, 9, 12)} == {4: 0, 6: 6, 9: 6, 12: 12}
