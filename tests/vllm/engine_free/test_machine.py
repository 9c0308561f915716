"""Long random runs of vLLM's scheduler over the real connector, with faults injected anywhere (laws L1, L3, L4, L6).

The model beside it is the harness: what every block must hold follows from its token prefix alone, what may be
reported from the scheduler's own state.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.vllm.harness import GroupSpec
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction
from umbp_core.tiers import Tier
from umbp_vllm import bands, layer_gate

HYBRID = (GroupSpec("full"), GroupSpec("window", window=10))
SHAPES: list[dict[str, Any]] = [
    {},
    {"tp": 2},
    {"pp": 2},
    {"groups": HYBRID, "num_blocks": 80},
    {"groups": (GroupSpec("mla", head_size=16),), "tp": 2},
    {"async_scheduling": True},
    {"async_scheduling": True, "lazy_execution": True, "v2_runner": True},
    {"v2_runner": True},
    {"draft_tokens": 3},
    {"draft_tokens": 2, "deferred_save": True},
    {"prefix_caching": False},
    {"max_num_batched_tokens": 17, "max_num_seqs": 8},
]
POOLS: list[dict[str, Any]] = [
    {},
    {"dram_capacity": "96KiB"},
    {"dram_capacity": "96KiB", "dram_high_watermark": 0.6, "dram_low_watermark": 0.3, "ssd_high_watermark": 0.02},
    {"load_timeout_s": 0.02, "store_timeout_s": 0.05},
    {"share_load_timeout_ms": 0, "max_pending_stores": 6},
    {"store_decode_blocks": False, "min_load_blocks": 2, "eviction_policy": "lru"},
    {"load_mode": "layerwise", "load_timeout_s": 0.1},
    {"load_mode": "layerwise", "load_timeout_s": 0.02, "dram_capacity": "96KiB"},
    {"dram_offload_policy": "presence,frequency", "ssd_offload_policy": "frequency,priority"},
    {"store_granularity": "layer"},
    {"store_granularity": "layer", "load_mode": "layerwise", "store_timeout_s": 0.05, "load_timeout_s": 0.1},
]
STEMS = [[(17 * index * stem + 31 * index) % 900 for index in range(70)] for stem in (1, 2, 3)]
DIRECTIONS = st.sampled_from([Direction.LOAD, Direction.STORE])
ALL = 1 << 30
"""More tokens than any prompt has."""


class UmbpMachine(RuleBasedStateMachine):
    """One engine with random requests, resets, aborts, slow and failing copies, and rotting objects."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="umbp-machine-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(bands, "BAND_BYTES", 1)
        self.patch.setattr(layer_gate, "GRACE_S", 0.02)
        self.engine: UmbpHarness | None = None
        self.names: list[str] = []
        self.most = ALL

    @initialize(
        shape=st.sampled_from(SHAPES),
        pool=st.sampled_from(POOLS),
        blocks=st.sampled_from([32, 48, 90]),
        ssd=st.booleans(),
    )
    def start(self, shape: dict[str, Any], pool: dict[str, Any], blocks: int, ssd: bool) -> None:
        extra = dict(pool)
        if ssd:
            extra |= {"ssd_dir": str(self.folder), "ssd_capacity": "2MiB"}
        self.spec = {"num_blocks": blocks, "max_model_len": 96, **shape}
        self.extra = extra
        self.engine = self._make_engine()

    def _make_engine(self) -> UmbpHarness:
        """An engine that takes ``most`` of the tokens that a match promises, where that promises more."""
        engine = UmbpHarness(self.extra, **self.spec)
        matched = engine.leader.get_num_new_matched_tokens

        def get_num_new_matched_tokens(request: Any, computed: int) -> tuple[int | None, bool]:
            count, later = matched(request, computed)
            return count if count is None else min(self.most, count), later

        engine.leader.get_num_new_matched_tokens = get_num_new_matched_tokens
        return engine

    @property
    def running(self) -> UmbpHarness:
        assert self.engine is not None
        return self.engine

    @rule(
        stem=st.sampled_from(STEMS),
        head=st.sampled_from([64, 1, 4, 9, 20, 31, 32, 45, 70]),
        tail=st.lists(st.integers(0, 900), max_size=6),
        max_tokens=st.sampled_from([6, 1, 3, 18]),
        salt=st.sampled_from([None, None, "tenant"]),
        lora=st.sampled_from([None, None, "adapter"]),
        twins=st.sampled_from([2, 1, 3]),
    )
    def add(
        self,
        stem: list[int],
        head: int,
        tail: list[int],
        max_tokens: int,
        salt: str | None,
        lora: str | None,
        twins: int,
    ) -> None:
        prompt = stem[:head] + tail or [5]
        for _ in range(twins):
            self.names.append(self.running.add(prompt, max_tokens, salt=salt, lora=lora))

    @rule(count=st.sampled_from([5, 1, 2, 12, 30]), patient=st.booleans())
    def step(self, count: int, patient: bool) -> None:
        for _ in range(count):
            if not self.running.step() and patient:
                self.running.yield_to_transfers()

    @precondition(lambda self: self.names)
    @rule(back=st.integers(0, 5), during=st.booleans())
    def abort(self, back: int, during: bool) -> None:
        name = self.names[max(0, len(self.names) - 1 - back)]
        (self.running.abort_during_step if during else self.running.abort)(name)

    @rule()
    def reset_engine_cache(self) -> None:
        self.running.reset_prefix_cache()

    @rule()
    def reset_engine_cache_and_preempt(self) -> None:
        """Refused, loudly, only for what vLLM holds itself: a request that is loading, or a step under way."""
        with contextlib.suppress(RuntimeError):
            self.running.reset_prefix_cache(running=True)
        assert not len(self.running.pool.held)

    @rule()
    def reset_pool(self) -> None:
        assert self.running.scheduler.reset_connector_cache()

    @precondition(lambda self: self.spec.get("groups") is not HYBRID)
    @rule(most=st.sampled_from([ALL, 1, 12, 13, 30, 47]))
    def take(self, most: int) -> None:
        """From now on; with a window less than was promised may need other blocks, and is refused."""
        self.most = most

    @rule(direction=DIRECTIONS, rank=st.integers(0, 3))
    def hold(self, direction: Direction, rank: int) -> None:
        copiers = self.running.copiers
        copiers[rank % len(copiers)].hold(direction)

    @rule(direction=DIRECTIONS)
    def release(self, direction: Direction) -> None:
        self.running.release(direction)

    @rule(direction=DIRECTIONS, rank=st.integers(0, 3))
    def toggle_failing(self, direction: Direction, rank: int) -> None:
        copiers = self.running.copiers
        copiers[rank % len(copiers)].fails ^= {direction}

    @rule(
        tier=st.sampled_from([Tier.DRAM, Tier.SSD]),
        which=st.integers(0, 200),
        count=st.integers(1, 5),
        rank=st.integers(0, 3),
    )
    def rot(self, tier: Tier, which: int, count: int, rank: int) -> None:
        """One bit each of objects that nobody reads at the moment."""
        keys = self.running.idle_objects(tier)
        for key in keys[which % len(keys) :][:count] if keys else ():
            self.running.corrupt(rank % len(self.running.ranks), key, tier)

    @precondition(lambda self: self.names)
    @rule(back=st.integers(0, 5), only_ssd=st.booleans())
    def ask_again(self, back: int, only_ssd: bool) -> None:
        """An earlier prompt, which vLLM itself has forgotten: served by the pool."""
        self._let_go()
        self.running.drain()
        self.running.reset_prefix_cache()
        if only_ssd:
            self.running.drop_from(Tier.DRAM)
        asked = self.running.asked[self.names[max(0, len(self.names) - 1 - back)]]
        self.names.append(self.running.add(asked.prompt + [7], 3, salt=asked.salt, lora=asked.lora))
        for _ in range(4):
            self.running.step()

    @precondition(lambda self: self.engine is not None)
    @rule()
    def calm_down(self) -> None:
        """Everything that was begun ends, and nothing is left."""
        self._let_go()
        self.running.drain()
        self.running.check_no_leak()
        self.running.check_stored()

    @precondition(lambda self: "ssd_dir" in self.extra and len(self.names) > 6)
    @rule()
    def restart(self) -> None:
        """A clean stop, and a new engine on the same folder."""
        self._let_go()
        rotten = self.running.rotten
        self.running.close()
        asked = [self.running.asked[name].prompt for name in self.names[:4]]
        self.engine = self._make_engine()
        self.engine.rotten = rotten
        self.names = [self.engine.add(prompt) for prompt in asked]

    def _let_go(self) -> None:
        for copier in self.running.copiers:
            copier.fails.clear()
            copier.release_all()

    @invariant()
    def tiers_are_within_their_bounds(self) -> None:
        """Law L8."""
        if self.engine is not None:
            for space in self.engine.pool.directory._spaces:
                stats = self.engine.pool.directory.stats(space)
                assert 0 <= stats.free_pages <= stats.total_pages
                assert stats.objects + stats.reserved <= stats.total_pages

    def teardown(self) -> None:
        try:
            if self.engine is not None and self.engine.healthy:
                self._let_go()
                self.engine.drain()
                self.engine.check_stored()
                self.engine.close()
        finally:
            self.patch.undo()
            if self.engine is not None:
                self.engine.close(check=False)
            shutil.rmtree(self.folder, ignore_errors=True)


UmbpMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestUmbpMachine = UmbpMachine.TestCase
