"""A real server whose L3 has less DRAM than it is asked to keep: what it evicts leaves the master, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from examples.serving_sglang import PAGES as METRIC
from examples.serving_sglang import SglangServer, extra_config
from tests.connectors.reporting.at_master import DRAM, HBM, Held, known_at
from tests.connectors.waiting import eventually
from tests.master.app.master_process import MasterProcess
from tests.sglang.server.servers import MAX_TOKENS, PAGES, prompts, server
from tests.sglang.server.test_reporting import PAGE_TOKENS, SOON, leading, node_at
from umbp_connectors.prompt_hashes.tags import hasher_of, tag_values

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOM = 40
"""Pages of 128 KiB that L3 has room for: less than three prompts."""
ASKED = prompts(200, 4)


@dataclass
class Scarce:
    """What the master knew, and what SGLang found in L3 of each prompt."""

    ids: list[list[bytes]] = field(default_factory=list)
    before: Held = field(default_factory=dict)
    flushed: Held = field(default_factory=dict)
    found: list[tuple[int, int]] = field(default_factory=list)
    """Of each prompt the pages that the master knew before it was asked again, and those that L3 gave."""


@pytest.fixture(scope="module")
def scarce(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scarce]:
    folder = tmp_path_factory.mktemp("scarce")
    with MasterProcess(folder, "--listen=none", "--metadata-backend=none") as master:
        pool = {
            "dram_capacity": ROOM * (128 << 10),
            "prefetch_threshold": PAGE_TOKENS,
            "master_address": f"umbp://{master.doors['native']}",
        }
        with server(model, folder, *extra_config(**pool)) as running:
            yield ask(running, master)


def ask(running: SglangServer, master: MasterProcess) -> Scarce:
    """Everything once; then, from L3 only, everything again."""
    assert eventually(lambda: node_at(master) is not None, SOON)
    node = node_at(master)
    assert node is not None
    hasher = hasher_of(tag_values(node.tags))
    scarce = Scarce([hasher.hashes(each) for each in ASKED])

    def known() -> Held:
        return known_at(master, node.node_id)

    def written() -> float:
        return sum(running.metric(METRIC, direction="put", result=result) for result in ("stored", "present"))

    for each in ASKED:
        running.complete(each, MAX_TOKENS)
    running.wait_until_stored(PAGES * len(ASKED))
    everything = {page for ids in scarce.ids for page in ids}
    eventually(lambda: known() == {HBM: everything, DRAM: everything}, SOON)
    scarce.before = known()
    running.flush_cache()
    eventually(lambda: HBM not in known() and len(known()[DRAM]) <= ROOM, SOON)
    scarce.flushed = known()
    for each, ids in zip(ASKED, scarce.ids, strict=True):
        there, puts = leading(ids, known().get(DRAM, set())), written()
        scarce.found.append((there, running.complete(each, MAX_TOKENS).storage // PAGE_TOKENS))
        assert eventually(lambda: written() >= puts + PAGES - there, SOON)  # noqa: B023 - waits here
        assert eventually(lambda: set(ids) <= known()[DRAM], SOON)  # noqa: B023 - waits here
    return scarce


def test_what_the_host_pool_has_is_known_though_l3_evicted_it(scarce: Scarce) -> None:
    everything = {page for ids in scarce.ids for page in ids}
    assert scarce.before == {HBM: everything, DRAM: everything}


def test_after_a_flush_only_what_l3_kept_is_known(scarce: Scarce) -> None:
    everything = {page for ids in scarce.ids for page in ids}
    assert set(scarce.flushed) == {DRAM}
    assert scarce.flushed[DRAM] < everything
    assert len(scarce.flushed[DRAM]) == ROOM


def test_what_is_known_of_l3_is_what_sglang_finds_there(scarce: Scarce) -> None:
    assert [known for known, _ in scarce.found] == [found for _, found in scarce.found]
    assert any(found > 0 for _, found in scarce.found)
    assert any(found < PAGES for _, found in scarce.found), "not everything fits"
