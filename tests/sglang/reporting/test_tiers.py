"""After each thing that happens to a page the master knows on which tiers it is, hash by hash."""

from __future__ import annotations

import pytest

from tests.connectors.reporting.at_master import DRAM, HBM, SSD, known_at
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.shapes import FULL, prompt_of
from tests.sglang.reporting.conftest import Start
from tests.sglang.reporting.rig import NODE, published

pytestmark = pytest.mark.parametrize("core", ["rust", "python"])
PROMPT = prompt_of(FULL, 6)


def ids(prompt: Prompt) -> set[bytes]:
    return set(published(prompt, FULL.page_size))


def test_a_page_is_told_on_every_tier_that_it_reaches(start: Start, core: str) -> None:
    node = start(core=core)
    node.knows([PROMPT])
    assert node.assert_equal() == {}
    node.engine.compute(PROMPT)
    assert node.assert_equal() == {HBM: ids(PROMPT)}
    node.engine.offload(PROMPT)
    assert node.assert_equal() == {HBM: ids(PROMPT), DRAM: ids(PROMPT), SSD: ids(PROMPT)}


def test_a_flush_empties_the_caches_and_not_the_storage(start: Start, core: str) -> None:
    node = start(core=core)
    node.knows([PROMPT])
    node.engine.compute(PROMPT)
    node.engine.offload(PROMPT)
    node.engine.flush()
    told = node.assert_equal()
    assert told == {DRAM: ids(PROMPT), SSD: ids(PROMPT)}, "in DRAM since L3 has a copy there"
    assert node.engine.prefetch(PROMPT) == len(PROMPT)
    assert node.assert_equal() == told
    assert node.engine.onboard(PROMPT) == len(PROMPT)
    assert node.assert_equal() == {HBM: ids(PROMPT), **told}


def test_a_restarted_engine_tells_what_is_on_its_ssd(start: Start, core: str) -> None:
    first = start(core=core)
    first.knows([PROMPT])
    first.engine.compute(PROMPT)
    first.engine.offload(PROMPT)
    first.assert_equal()
    first.engine.stop()
    first.component.kv_event_publisher.shutdown()
    assert known_at(first.master, NODE) == {}, "a node that ends in order says so"
    second = start(core=core)
    second.knows([PROMPT])
    assert second.assert_equal() == {SSD: ids(PROMPT)}


def test_what_happens_at_a_time_is_told_in_a_few_messages(start: Start, core: str) -> None:
    """UMBP's adapter calls its master once for each event, which bounds it at some thousand blocks a second."""
    node = start(core=core, extra={"report_interval_ms": 60_000})
    prompts = [prompt_of(FULL, 8, first) for first in range(1, 800, 100)]
    node.knows(prompts)
    for prompt in prompts:
        node.engine.compute(prompt)
        node.step()
    assert node.assert_equal() == {HBM: set().union(*map(ids, prompts))}
    stats = node.reporting.reporter.stats()
    assert stats.came[HBM] == 8 * len(prompts)
    assert stats.client.batches <= 4


def test_metrics_say_what_was_reported(start: Start, core: str) -> None:
    node = start(core=core)
    node.knows([PROMPT])
    node.engine.compute(PROMPT)
    node.assert_equal()
    node.engine.backend._watched(node.reporting)
    counted = {
        (sample.name, *sample.labels.values()): sample.value
        for family in node.engine.backend.metrics.collect()
        for sample in family.samples
    }
    assert counted["umbp_sglang_report_hashes_total", "hbm", "came"] == 6
    assert counted["umbp_sglang_report_acknowledged_hashes_total",] >= 6
    assert counted["umbp_sglang_report_untold_pages",] == 0
