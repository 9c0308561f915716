"""The leader's own pool keeps room in its tiers, in the engine's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction
from umbp_core.tiers import Tier

SMALL: dict[str, Any] = {"dram_capacity": 32 * 4096, "dram_high_watermark": 0.5, "dram_low_watermark": 0.25}
PROMPTS = [tokens(24, first=100 * number) for number in range(1, 7)]
"""Six blocks each."""


def used(engine: UmbpHarness, tier: Tier = Tier.DRAM) -> int:
    stats = engine.pool.directory.stats(tier)
    return stats.total_pages - stats.free_pages


def test_when_the_engine_rests_the_tier_is_below_its_mark(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(SMALL)
    for prompt in PROMPTS[:5]:
        engine.store(prompt)
        assert used(engine) <= 16
        assert all(engine.present(prompt))
    assert engine.stat("trimmed_blocks", "dram") == engine.stat("evicted_blocks", "dram") == 30 - used(engine)
    assert engine.check_stored() == used(engine)
    assert not engine.pool.has_work
    assert engine.reset_prefix_cache()
    engine.close()


def test_what_leaves_dram_is_on_ssd_and_found_after_a_restart(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    extra = {**SMALL, "ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}
    engine = make_umbp(extra)
    for prompt in PROMPTS:
        engine.store(prompt)
    assert used(engine) <= 16
    assert all(all(engine.present(prompt, Tier.SSD)) for prompt in PROMPTS)
    assert engine.stat("trimmed_blocks", "ssd") == 0
    engine.close()
    total = engine.pool.directory.stats(Tier.SSD).total_pages
    engine = make_umbp({**extra, "ssd_high_watermark": 20 / total, "ssd_low_watermark": 12 / total})
    engine.add(PROMPTS[5], max_tokens=1)
    engine.drain()
    assert engine.stat("hit_tokens", "ssd") == 24
    assert used(engine, Tier.SSD) == 12
    assert all(engine.present(PROMPTS[5], Tier.SSD))
    engine.close()


def test_what_an_op_holds_stays(make_umbp: MakeUmbp) -> None:
    engine = make_umbp({**SMALL, "dram_low_watermark": 0.01})
    engine.store(PROMPTS[0])
    engine.copiers[0].hold(Direction.LOAD)
    engine.add(PROMPTS[0], max_tokens=1)
    for _ in range(3):
        engine.step()
    for prompt in PROMPTS[1:4]:
        engine.add(prompt, max_tokens=1)
    for _ in range(20):
        engine.step()
    assert all(engine.present(PROMPTS[0]))
    engine.copiers[0].release_all()
    engine.drain()
    assert used(engine) <= 16
    assert engine.stat("hit_tokens", "dram") == 24
    engine.close()
