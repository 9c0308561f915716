"""The page about vLLM quotes the recorded cost of a step, and says which targets it misses."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COSTS = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8").partition("\n## What it costs a step\n")[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "leader.json").read_text(encoding="utf-8"))


def test_the_cost_of_a_step_is_what_was_measured() -> None:
    (row,) = [row for row in RESULTS["sections"]["Four changes per step"] if row["running"] == 256]
    quiet = RESULTS["sections"]["Other loads"][0]
    text = " ".join(COSTS.partition("\n## ")[0].split())
    assert quiet["fill a block"] < 1
    assert f"**{row['p50 us']:.0f} us in the median, {row['p99 us']:.0f} us for 99 of 100**" in text
    assert f"nearly nothing changes costs {quiet['p50 us']:.0f} us;" in text
    one, *_, most = (f"{row['p50 us']:.0f} us" for row in RESULTS["sections"]["Four changes per step"])
    assert f"it is {one} for one running request and {most} for 1024" in text


def test_the_median_misses_both_targets_and_the_page_says_so() -> None:
    (row,) = [row for row in RESULTS["sections"]["Four changes per step"] if row["running"] == 256]
    assert row["p50 us"] > 80
    assert row["p99 us"] < 500
    assert "the median misses both**" in " ".join(COSTS.split())
    assert "p50 80 us, p99 1000 us; and the stricter ones p50 50 us, p99 500 us." in RESULTS["notes"][0]
