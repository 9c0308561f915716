"""Random traffic through the real connector in every engine configuration that the harness can simulate."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.engine_free.test_harness import CONFIGURATIONS
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.traffic import Traffic, tokens
from umbp_core.ops import Direction

NAMES = [name for name in CONFIGURATIONS if name not in {"sync", "slow"}]


def configuration(name: str) -> dict[str, Any]:
    """A configuration of the harness's own tests, without what only their connector understands."""
    return {key: value for key, value in CONFIGURATIONS[name].items() if key != "extra"}


@pytest.mark.parametrize("name", NAMES)
def test_random_traffic(make_umbp: MakeUmbp, name: str) -> None:
    engine = make_umbp(num_blocks=96, max_model_len=96, **configuration(name))
    loaded = Traffic(engine, random.Random(name)).run(steps=150)
    assert engine.check_stored() > 0
    engine.close()
    assert loaded > 0


@pytest.mark.parametrize("name", ["plain", "tp2", "hybrid", "async", "v2 runner"])
def test_random_traffic_with_an_ssd_tier(make_umbp: MakeUmbp, name: str, tmp_path: Path) -> None:
    extra = {"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB", "dram_capacity": "320KiB"}
    engine = make_umbp(extra, num_blocks=96, max_model_len=96, **configuration(name))
    traffic = Traffic(engine, random.Random(name))
    traffic.run(steps=150)
    engine.check_stored()
    assert engine.stat("hit_tokens", "ssd") > 0
    engine.close()


@pytest.mark.parametrize("name", ["plain", "tp2", "pp2", "async lazy", "hybrid", "drafts"])
def test_a_small_engine_that_preempts(make_umbp: MakeUmbp, name: str) -> None:
    blocks = 60 if name == "hybrid" else 30
    engine = make_umbp(num_blocks=blocks, max_model_len=96, **configuration(name))
    engine.pace()
    traffic = Traffic(engine, random.Random(name), max_tokens=40)
    traffic.run(steps=250)
    engine.check_stored()
    engine.close()
    assert traffic.preemptions > 0


GROUPS: dict[str, tuple[GroupSpec, ...]] = {
    "blocks of two sizes": (GroupSpec("full"), GroupSpec("window", heads=1, window=14)),
    "many windows": (GroupSpec("full", layers=1), GroupSpec("window", layers=3, window=9)),
    "two windows": (GroupSpec("full"), GroupSpec("window", window=6), GroupSpec("window", window=17)),
    "windows alone": (GroupSpec("window", window=9),),
    "chunks": (GroupSpec("full"), GroupSpec("chunk", window=16)),
    "latent and window": (GroupSpec("mla", head_size=32), GroupSpec("window", window=9)),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("more", [{}, {"tp": 2}, {"async_scheduling": True}], ids=["plain", "tp2", "async"])
@pytest.mark.statement("connector", 84)
def test_other_kv_groups(make_umbp: MakeUmbp, groups: str, more: dict[str, Any]) -> None:
    engine = make_umbp(groups=GROUPS[groups], num_blocks=200, max_model_len=96, **more)
    loaded = Traffic(engine, random.Random(groups)).run(steps=120)
    assert engine.check_stored() > 0
    engine.close()
    assert loaded > 0


def test_a_pool_smaller_than_the_working_set(make_umbp: MakeUmbp) -> None:
    engine = make_umbp({"dram_capacity": "96KiB"}, num_blocks=64, max_model_len=96)
    Traffic(engine, random.Random(7)).run(steps=300)
    assert engine.pool.directory.stats(next(iter(engine.pool.directory._spaces))).total_pages == 24
    assert engine.stat("evicted_blocks", "dram") > 100
    engine.check_stored()
    engine.close()


@pytest.mark.parametrize(("most", "copies"), [(16, 1), (2, 3)])
def test_no_more_blocks_are_stored_at_once_than_wanted(make_umbp: MakeUmbp, most: int, copies: int) -> None:
    engine = make_umbp({"max_transfer_blocks": most})
    engine.store(tokens(24))
    (copier,) = engine.copiers
    assert copier.calls[Direction.STORE] == copies
    engine.close()
