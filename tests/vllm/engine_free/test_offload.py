"""Offload policies in the leader: what goes to DRAM and to SSD, by sightings and by what requests say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.metrics.stats import CachingMetrics

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.errors import ConfigError
from umbp_core.tiers import Tier
from umbp_vllm.priorities import PARAMETER, RequestPriorities

PROMPT = tokens(24)
"""Six blocks."""
NONE, ALL = [False] * 6, [True] * 6


def ask(engine: UmbpHarness, prompt: list[int] = PROMPT, **how: Any) -> None:
    """A request that is computed or loaded to its end, and everything that follows."""
    engine.add(prompt, max_tokens=1, **how)
    engine.drain()


def forget(engine: UmbpHarness) -> None:
    """vLLM's own prefix cache is empty from now on."""
    assert engine.reset_prefix_cache()


def with_ssd(folder: Path, policy: str, **more: Any) -> dict[str, Any]:
    return {"ssd_dir": str(folder), "ssd_capacity": "4MiB", "ssd_offload_policy": policy, **more}


@pytest.mark.statement("connector", 76)
def test_with_frequency_a_block_comes_to_dram_when_it_is_computed_again(make_umbp: MakeUmbp) -> None:
    engine = make_umbp({"dram_offload_policy": "presence,frequency"})
    engine.store(PROMPT)
    assert engine.present(PROMPT) == NONE
    assert engine.stat("refused_blocks", "dram", "frequency") == 6
    engine.store(PROMPT[:12] + [999] * 12)
    assert engine.present(PROMPT) == [True] * 3 + [False] * 3
    assert engine.stat("refused_blocks", "dram", "frequency") == 9
    assert engine.check_stored() == 3
    engine.close()


@pytest.mark.statement("connector", 73)
@pytest.mark.parametrize("in_hbm", [True, False])
def test_with_frequency_a_block_comes_to_ssd_when_it_is_used_again(
    make_umbp: MakeUmbp, tmp_path: Path, in_hbm: bool
) -> None:
    """Whether vLLM has it still, or loads it from DRAM."""
    engine = make_umbp(with_ssd(tmp_path, "frequency"))
    ask(engine)
    assert engine.present(PROMPT, Tier.DRAM) == ALL
    assert engine.present(PROMPT, Tier.SSD) == NONE
    assert engine.stat("refused_blocks", "ssd", "frequency") == 6
    if not in_hbm:
        forget(engine)
    ask(engine, PROMPT[:13])
    assert engine.present(PROMPT, Tier.SSD) == [True] * 3 + [False] * 3
    assert engine.check_stored() == 9
    engine.close()


@pytest.mark.statement("connector", 73)
def test_a_request_that_waits_sees_its_blocks_once(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    """vLLM looks a request up in each step in which it finds no room for it."""
    engine = make_umbp(with_ssd(tmp_path, "frequency", offload_min_sightings=3), num_blocks=18, max_model_len=64)
    ask(engine)
    engine.add(tokens(32, first=500), max_tokens=20)
    engine.step()
    waiting = engine.add(PROMPT + tokens(12, first=900), max_tokens=1)
    for _ in range(5):
        engine.step()
    assert not engine.tokens[waiting]
    engine.drain()
    assert engine.present(PROMPT, Tier.SSD) == NONE
    forget(engine)
    ask(engine)
    assert engine.present(PROMPT, Tier.SSD) == ALL
    engine.close()


@pytest.mark.statement("connector", 73)
def test_the_filter_before_ssd_is_off_unless_it_is_asked_for(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    engine = make_umbp({"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"})
    engine.store(PROMPT)
    assert engine.present(PROMPT, Tier.SSD) == ALL
    assert engine.pool.loads._used is None
    assert engine.pool.stores._gate is None
    assert engine.pool.stores._demotion_gate is None
    engine.close()


@pytest.mark.statement("connector", 75)
@pytest.mark.parametrize(("policy", "in_dram"), [("presence", NONE), ("all", ALL)])
def test_presence_keeps_out_of_dram_what_ssd_has(
    make_umbp: MakeUmbp, tmp_path: Path, policy: str, in_dram: list[bool]
) -> None:
    engine = make_umbp(with_ssd(tmp_path, "presence", dram_offload_policy=policy))
    engine.store(PROMPT)
    engine.drop_from(Tier.DRAM, PROMPT)
    ask(engine, skip_reading=True)
    assert engine.present(PROMPT, Tier.DRAM) == in_dram
    stored = engine.stat("stored_blocks", "ssd")
    assert stored == 6, "what SSD has is not written there again"
    engine.close()


HIGH_LOW_HIGH = [
    {"token_start": 0, "token_end": 8, "priority": 80},
    {"token_start": 8, "token_end": 12, "priority": 10},
    {"token_start": 12, "token_end": None, "priority": 80},
]


@pytest.mark.statement("connector", 21)
@pytest.mark.statement("connector", 22)
@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD])
@pytest.mark.parametrize("step_tokens", [8, 64])
def test_blocks_before_the_first_of_low_priority_go_and_none_behind_it(
    make_umbp: MakeUmbp, tmp_path: Path, tier: Tier, step_tokens: int
) -> None:
    """Also when the prompt is computed in parts."""
    both = {"dram_offload_policy": "presence"} if tier is Tier.SSD else {"dram_offload_policy": "priority"}
    extra = with_ssd(tmp_path, "priority" if tier is Tier.SSD else "presence", offload_min_priority=30, **both)
    engine = make_umbp(extra, max_num_batched_tokens=step_tokens, max_num_seqs=4)
    ask(engine, parameters={PARAMETER: HIGH_LOW_HIGH})
    assert engine.present(PROMPT, tier) == [True, True, False, False, False, False]
    assert engine.stat("refused_blocks", tier.name.lower(), "priority") == 4
    engine.close()


@pytest.mark.statement("connector", 21)
@pytest.mark.parametrize(
    ("how", "stored"),
    [
        ({}, True),
        ({"priority": 5}, True),
        ({"priority": 6}, False),
        ({"priority": -200}, True),
        ({"parameters": {"do_remote_prefill": False}}, True),
        ({"parameters": {PARAMETER: 29}}, False),
        ({"parameters": {PARAMETER: 30}, "priority": 50}, True),
    ],
)
def test_where_a_requests_priority_comes_from(make_umbp: MakeUmbp, how: dict[str, Any], stored: bool) -> None:
    """Its parameter, else 35 less vLLM's priority, of which lower is more urgent."""
    engine = make_umbp({"dram_offload_policy": "priority", "offload_min_priority": 30})
    ask(engine, **how)
    assert engine.present(PROMPT) == (ALL if stored else NONE)
    engine.close()


@pytest.mark.statement("connector", 21)
def test_a_threshold_of_0_lets_everything_pass(make_umbp: MakeUmbp) -> None:
    engine = make_umbp({"dram_offload_policy": "priority"})
    ask(engine, parameters={PARAMETER: 0})
    assert engine.present(PROMPT) == ALL
    engine.close()


BAD = [
    "high",
    -1,
    101,
    True,
    None,
    [[0, 8, 80]],
    [{"token_start": 0}],
    [{"token_start": 8, "token_end": 8, "priority": 5}],
    [{"token_start": 0, "priority": 5, "color": 1}],
    [{"token_start": 0, "priority": 5}] * 65,
]


@pytest.mark.parametrize("said", BAD, ids=lambda said: str(said)[:30])
def test_a_priority_that_is_none_costs_its_request_nothing_but_the_priority(make_umbp: MakeUmbp, said: Any) -> None:
    engine = make_umbp({"dram_offload_policy": "priority", "offload_min_priority": 30})
    ask(engine, parameters={PARAMETER: said})
    ask(engine, tokens(24, first=300), parameters={PARAMETER: 20})
    assert engine.present(PROMPT) == ALL
    assert engine.present(tokens(24, first=300)) == NONE
    assert engine.stat("degraded", "priority") == 1
    engine.close()


class _Request:
    priority = 0

    def __init__(self, said: Any) -> None:
        self.kv_transfer_params = {PARAMETER: said}


def test_later_ranges_win_and_gaps_have_the_default() -> None:
    priorities = RequestPriorities.of(
        _Request(
            [
                {"token_start": 4, "token_end": 100, "priority": 90},
                {"token_start": 50, "token_end": 60, "priority": 20},
                {"token_start": 70, "priority": 10},
            ]
        )
    )
    assert [priorities.lowest(end) for end in (1, 4, 50, 51, 70, 71, 10_000)] == [35, 35, 35, 20, 20, 10, 10]


def test_a_policy_that_nobody_offers_stops_the_start(make_umbp: MakeUmbp) -> None:
    with pytest.raises(ConfigError, match="'often'"):
        make_umbp({"ssd_offload_policy": "often"})


def test_a_mode_that_is_for_plug_ins_stops_the_start(make_umbp: MakeUmbp) -> None:
    with pytest.raises(ConfigError, match="mode 'distributed' is not for vLLM; set mode 'local' or 'daemon'"):
        make_umbp({"mode": "distributed"})


@pytest.mark.statement("connector", 76)
def test_blocks_of_low_priority_leave_both_tiers_first(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    """Though they came last; and also when they came back from SSD."""
    sizes = {"dram_capacity": 16 * 4096, "ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}
    engine = make_umbp({**sizes, "eviction_policy": "priority_lru"})
    high, low, new = PROMPT, tokens(24, first=300), tokens(24, first=600)
    ask(engine, high, parameters={PARAMETER: 80})
    ask(engine, low, parameters={PARAMETER: 10})
    forget(engine)
    order = [*engine.pool.directory._spaces[Tier.SSD].policy.victims()]
    assert set(order[:6]) == set(engine.keys(low)[0]), "the copies on SSD have it too"
    engine.drop_from(Tier.DRAM, low)
    ask(engine, [*low, 9])
    assert engine.stat("hit_tokens", "ssd") == 24
    ask(engine, new)
    assert engine.present(high, Tier.DRAM) == ALL
    assert engine.present(new, Tier.DRAM) == ALL
    assert sum(engine.present(low, Tier.DRAM)) == 16 - 12
    engine.close()


@pytest.mark.statement("connector", 92)
def test_hit_rates_are_hits_over_tokens_asked_for(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    """Of our counters, and of vLLM's log, which has the last 1000 requests that asked for anything."""
    engine = make_umbp({"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"})
    rates = CachingMetrics()
    make_stats = engine.scheduler.make_stats

    def observed(*arguments: Any, **more: Any) -> Any:
        stats = make_stats(*arguments, **more)
        rates.observe(stats.connector_prefix_cache_stats)
        return stats

    engine.scheduler.make_stats = observed
    engine.store(PROMPT)
    engine.drop_from(Tier.DRAM, PROMPT[:12])
    ask(engine, [*PROMPT, *tokens(8, first=700)])
    ask(engine, tokens(3, first=800))
    hits = {tier: engine.stat("hit_tokens", tier) for tier in ("dram", "ssd")}
    asked = engine.stat("lookup_tokens")
    assert hits == {"dram": 12, "ssd": 12}
    assert asked == 24 + 32
    assert engine.stat("lookups") == 2, "a prompt of less than a block asks for nothing"
    assert rates.aggregated_query_hit == 24
    assert 0 < rates.hit_rate < 1
    engine.close()
