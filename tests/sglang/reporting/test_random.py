"""Some hundred things that happen to pages at random; what the master knows is the truth in between and at the end."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from tests.connectors.reporting.at_master import DRAM, HBM, SSD
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.shapes import FULL, SWA, branch, prompt_of
from tests.sglang.reporting.conftest import Start
from tests.sglang.reporting.rig import Reported

SMALL = {"dram_capacity": "96KiB", "ssd_capacity": "1200KiB"}
"""Room for 24 pages in L3's DRAM and some 35 on its SSD."""
FOR_TWO = {"dram_capacity": "192KiB", "ssd_capacity": "2400KiB"}
"""The same for each of two pools."""


def family(first: int, **namespace: str) -> list[Prompt]:
    """Prompts of one namespace that share beginnings."""
    trunk = prompt_of(FULL, 10, first)
    prompts = [trunk, trunk.cut(20), branch(trunk, 4), branch(trunk, 7, 2), prompt_of(FULL, 6, first + 500)]
    return [Prompt(each.tokens, **namespace) for each in prompts]


PROMPTS = [
    *family(1),
    *family(2000),
    *family(1, cache_salt="salt"),
    *family(1, extra_key="one"),
    *family(1, extra_key="two"),
    *family(1, extra_key="one", cache_salt="salt"),
    *family(3000, extra_key="an adapter"),
]


class Life:
    """What a scheduler and an operator do to an engine, in any order."""

    def __init__(self, node: Reported, seed: int) -> None:
        self.node, self.engine = node, node.engine
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.seen: Counter[int] = Counter()
        node.knows(PROMPTS)

    def step(self) -> None:
        steps = {self.compute: 8, self.offload: 6, self.evict: 4, self.evict_host: 3, self.come_back: 6}
        rare = {self.flush: 0.4, self.clear: 0.3}
        everything = {**steps, **rare}
        (chosen,) = self.random.choices(list(everything), list(everything.values()))
        chosen()
        self.done[chosen.__name__] += 1
        if self.random.random() < 0.7:
            self.node.step()

    def compute(self) -> None:
        prompt = self.random.choice(PROMPTS)
        if self.engine.allocator.available_size() < 2 * len(prompt):
            self.evict()
        if self.engine.allocator.available_size() < 2 * len(prompt):
            self.flush()
        self.engine.compute(prompt)

    def offload(self) -> None:
        prompt = self._on_device()
        if prompt is not None:
            self.engine.cache.evict_host(2 * len(prompt))
            self.engine.offload(prompt)

    def evict(self) -> None:
        self.engine.cache.evict(EvictParams(num_tokens=self.random.randrange(8, 80)))

    def evict_host(self) -> None:
        self.engine.cache.evict_host(self.random.randrange(8, 80))

    def come_back(self) -> None:
        prompt = self.random.choice(PROMPTS)
        self.engine.prefetch(prompt)
        if self.engine.allocator.available_size() > 2 * len(prompt):
            self.engine.onboard(prompt)

    def flush(self) -> None:
        self.engine.flush()

    def clear(self) -> None:
        self.engine.backend.clear()

    def compare(self) -> None:
        for tier, hashes in self.node.assert_equal().items():
            self.seen[tier] += len(hashes)

    def _on_device(self) -> Prompt | None:
        prompts = [each for each in PROMPTS if self.engine.match(each).device_prefix_len == len(each)]
        return self.random.choice(prompts) if prompts else None


@pytest.mark.parametrize(
    ("core", "cfg", "sizes", "seed"),
    [("rust", FULL, SMALL, 1), ("python", FULL, SMALL, 2), ("rust", SWA, FOR_TWO, 3)],
    ids=["rust", "python", "windows"],
)
def test_a_long_random_life(start: Start, core: str, cfg: object, sizes: dict[str, object], seed: int) -> None:
    node = start(cfg=cfg, core=core, extra=sizes)
    node.engine.names._names["an adapter"] = "name"
    life = Life(node, seed)
    for _ in range(60):
        for _ in range(10):
            life.step()
        life.compare()
    assert min(life.seen[tier] for tier in (HBM, DRAM, SSD)) > 100, life.seen
    assert min(life.done.values()) > 0, life.done
    stats = node.reporting.reporter.stats()
    assert (stats.failures, stats.overflows) == (0, 0)
    assert node.reporting._placements.unbalanced == 0
    assert node.reporting.pages.untold == 0
