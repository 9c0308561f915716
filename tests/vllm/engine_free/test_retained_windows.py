"""Drafts of several modules (MTP): vLLM keeps more of a sliding window than its attention sees."""

from __future__ import annotations

import dataclasses

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import GroupSpec, engine
from tests.vllm.harness.traffic import tokens
from umbp_core.ops import Direction

MORE = 2
"""Tokens that vLLM keeps behind the window: one for each module but the first."""
GROUPS = {
    "window": (GroupSpec("window", window=9),),
    "full-and-window": (GroupSpec("full"), GroupSpec("window", window=9)),
}


@pytest.fixture(autouse=True)
def _windows_are_kept_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM marks them where the draft has several modules."""
    make_geometry = engine.make_geometry

    def marked(*arguments: object) -> object:
        geometry = make_geometry(*arguments)
        for config in (*geometry.ranks, geometry.scheduler):
            group = config.kv_cache_groups[-1]
            group.kv_cache_spec = dataclasses.replace(group.kv_cache_spec, extra_retained_tokens=MORE)
        return geometry

    monkeypatch.setattr(engine, "make_geometry", marked)


@pytest.mark.parametrize("length", [24, 42, 48])
@pytest.mark.parametrize("kind", GROUPS)
def test_a_load_fills_every_block_that_its_request_gets(make_umbp: MakeUmbp, kind: str, length: int) -> None:
    """What it left out would be listed by hash all the same, and be read by another request."""
    opened = make_umbp(groups=GROUPS[kind], draft_tokens=MORE + 1)
    opened.store(tokens(48))
    opened.hold(Direction.LOAD)
    name = opened.add(tokens(length), max_tokens=20)
    opened.step_until(lambda: bool(opened.external_tokens(name)))
    (flight,) = opened.pool.ledger._in_flight.values()
    loaded = {(block.group, block.hbm_block) for block in flight.op.blocks}
    tables = opened.scheduler.kv_cache_manager.get_block_ids(name)
    assert loaded == {(group, block) for group, table in enumerate(tables) for block in table if block}
    opened.release(Direction.LOAD)
    opened.run_until_finished()
    opened.check_stored()
    opened.close()
