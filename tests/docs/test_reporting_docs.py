"""The page of reporting says what the code does: names, tags, keys, bounds, metrics, and an example that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.master.app.master_process import MasterProcess
from umbp_connectors.config import KEYS, UmbpConfig
from umbp_connectors.reporting import feed, opening, reporter, stats
from umbp_connectors.reporting.node import NodeFacts, registration_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "reporting.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_key_of_reporting_is_in_the_table_with_its_variable() -> None:
    mine = {key for key in KEYS if key.startswith(("master_", "node_", "report"))}
    table = section("Settings")
    assert set(re.findall(r"`([a-z_]+)`", table.partition("\nNames")[0])) & set(KEYS) == mine
    assert {UmbpConfig.env_name(key) for key in mine} == set(re.findall(r"`(UMBP_[A-Z_]+)`", table))
    interval = UmbpConfig.model_fields["report_interval_ms"].default
    assert f"| `report_interval_ms` | `UMBP_REPORT_INTERVAL_MS` | {interval} |" in table
    assert interval == reporter.INTERVAL * 1000


def test_every_tag_of_a_registration_is_in_the_table() -> None:
    facts = NodeFacts("vllm", "m", "1", "both", "h", 1)
    tags = {tag.partition("=")[0] for tag in registration_of(facts, UmbpConfig()).tags}
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", section("Who the node is"), re.MULTILINE))
    assert tags <= set(re.findall(r"`(\w+)`", first_cells))


def test_the_bound_and_the_metrics_are_those_of_the_code() -> None:
    assert f"Each source may have {feed.MAX_WAITING} hashes waiting" in PAGE
    named = set(re.findall(r"`(report_\w+)", section("Metrics")))
    assert named <= {metric.name for metric in stats.REPORT_METRICS}
    assert opening.__name__ in PAGE


def test_the_example_runs_with_a_master_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UMBP_REPORT", raising=False)
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    example = (
        code[1].replace("flush(timeout=5.0)", "flush(timeout=WAIT)").replace("reporter.flush", "told = reporter.flush")
    )
    with MasterProcess(tmp_path) as master:
        names: dict[str, object] = {"WAIT": 60.0}
        exec(compile(example.replace("127.0.0.1:50052", master.doors["native"]), "reporting.md", "exec"), names)
        assert names["told"] is True
    names = {"WAIT": 0.1}
    exec(compile(example.replace("127.0.0.1:50052", "127.0.0.1:1"), "reporting.md", "exec"), names)
    assert names["told"] is False


def test_the_figures_are_those_of_the_benchmark() -> None:
    results = json.loads((DOCS.parent / "benchmarks" / "results" / "reporting.json").read_text(encoding="utf-8"))
    sections = results["sections"]
    assert all(row["met"] for row in sections["Targets"])
    paid = [round(row["step pays us, p50"]) for row in sections["Rates"]]
    fast = sections["Rates"][-1]
    alone, beside = (round(row["p50 ms"]) for row in sections["From event to visibility"])
    processor = float(fast["threads' processor"].rstrip("%"))
    native = sections["Bytes per block on the wire"][0]
    few, many = round(native["200 blocks/s"]), round(native["20000 blocks/s"])
    for figures in (
        f"| {min(paid)} to {max(paid)} us |",
        f"with {processor:.0f} % of a core",
        f"| {alone} ms without other load, {beside} ms beside 20 000 blocks a second",
        f"| {few} at 200 blocks a second, {many} at 20 000 |",
    ):
        assert figures in PAGE, figures
