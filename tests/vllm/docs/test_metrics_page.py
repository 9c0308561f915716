"""Every counter is on the metrics page with its labels and its meaning, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

from umbp_vllm.stats import METRICS, SEPARATOR, UmbpStats

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_every_counter_is_on_the_page_with_its_labels() -> None:
    text = PAGE.read_text()
    for name, (meaning, labels) in METRICS.items():
        shown = ", ".join(f"`{label}`" for label in labels) or "-"
        assert f"| `{name}` | {shown} | {meaning} |" in text, f"docs/metrics.md lacks or misdescribes {name}"


def test_the_page_names_no_counter_that_does_not_exist() -> None:
    named = set(re.findall(r"`(vllm:umbp_[a-z_]+)`", PAGE.read_text()))
    assert named == set(METRICS)


def test_counters_add_up_over_engines_and_show_throughput() -> None:
    first, second = UmbpStats(), UmbpStats()
    first.add("vllm:umbp_bytes", 3e9, "load", "dram")
    first.add("vllm:umbp_op_seconds", 1.0, "load")
    second.add("vllm:umbp_bytes", 1e9, "load", "dram")
    second.add("vllm:umbp_bytes", 2e9, "load", "ssd")
    total = first.aggregate(UmbpStats(data=second.to_dict()))
    assert total.data == {
        SEPARATOR.join(("vllm:umbp_bytes", "load", "dram")): 4e9,
        SEPARATOR.join(("vllm:umbp_bytes", "load", "ssd")): 2e9,
        SEPARATOR.join(("vllm:umbp_op_seconds", "load")): 1.0,
    }
    assert total.reduce()["load_GB_per_s"] == 6.0
    first.reset()
    assert first.is_empty()
