"""What the log says when a pool opens: the one line that an operator looks for."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import contents, hashes, mha_pool, mla_pool, rows, storage_config


def opened(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines since the last call."""
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    caplog.clear()
    return [line for line in lines if " open: " in line]


def test_both_tiers_and_what_a_restart_found(stores: Stores, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = storage_config(extra={"dram_capacity": "4MiB", "ssd_dir": str(tmp_path), "ssd_capacity": "16MiB"})
    pool = mha_pool()
    with caplog.at_level(logging.INFO, logger="umbp_sglang"):
        store = stores(config, pool)
        assert store.batch_set_v1(hashes(3), rows(0, 1, 2)) == [True] * 3
        store.close()
        stores(config, pool)
    first, second = opened(caplog)
    form = (
        r"umbp: pool kv open: pages of 0\.00 MiB, DRAM tier of 0\.00 GiB \((\d+) pages\), "
        r"SSD tier of 0\.0\d GiB with (\d+) pages from before"
    )
    texts = [re.fullmatch(form, line) for line in (first, second)]
    assert [text and text[2] for text in texts] == ["0", "3"]
    (page,) = contents(pool, [0])
    assert len(page) <= 4096
    assert texts[0] is not None
    assert int(texts[0][1]) == (4 << 20) // 4096, "a page takes at least one slot of 4096 bytes"


def test_without_an_ssd_tier_and_for_a_rank_that_reads_its_sibling(
    stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="umbp_sglang"):
        stores(storage_config(mla=True, tp=(0, 2)), mla_pool())
        stores(storage_config(mla=True, tp=(1, 2)), mla_pool())
    writer, reader = opened(caplog)
    assert writer.endswith("pages), no SSD tier")
    assert reader.endswith("read where the first rank keeps them")
