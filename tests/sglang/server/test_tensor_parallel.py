"""Two ranks, each with the pages of its own heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.serving_sglang import PAGE_TOKENS, cpu_only, extra_config
from tests.sglang.server.servers import MAX_TOKENS, PAGES, prompts, server

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_two_ranks_find_what_both_stored(model: Path, tmp_path: Path) -> None:
    questions = prompts(0, 2)
    pool = {"dram_capacity": "64MiB", "ssd_dir": tmp_path / "ssd", "ssd_capacity": "128MiB"}
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|0"} if cpu_only() else {}
    with server(model, tmp_path, *extra_config(**pool), "--tp-size", "2", environment=environment) as running:
        cold = [running.complete(each, MAX_TOKENS) for each in questions]
        running.wait_until_stored(2 * len(questions) * PAGES)
        running.flush_cache()
        found = [running.complete(each, MAX_TOKENS) for each in questions]
    assert [answer.cached_tokens for answer in cold] == [0, 0]
    assert [answer.storage for answer in found] == [PAGES * PAGE_TOKENS] * 2
    assert [answer.tokens for answer in found] == [answer.tokens for answer in cold]
    ranks = {path.parent.name for path in (tmp_path / "ssd").glob("*/*/slab-*")}
    assert ranks == {"rank0", "rank1"}, "each rank has a part of its own"
