"""The pages of the pool, the daemon and SGLang say which figures miss their targets, and quote what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def sections(name: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(
        (ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")
    )["sections"]
    return found


def speed(name: str) -> str:
    """The chapter about speed."""
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    return re.split(r"^## ", page.partition("\n## Speed\n")[2], flags=re.MULTILINE)[0]


def missed(rows: list[dict[str, Any]], ratio: str, target: float | None = None) -> dict[str, list[str]]:
    """By size of the objects, and how they are given: put and get, of those that miss their target."""
    found: dict[str, list[str]] = {}
    low: set[str] = set()
    for row in rows:
        objects = row["object"] + (f" as {row['given as']}" if "given as" in row else "")
        found.setdefault(objects, []).append(f"{row[ratio]:.2f}")
        if row[ratio] < (row["target, of 1 thread"] if target is None else target):
            low.add(objects)
    return {size: figures for size, figures in found.items() if size in low}


def listed(text: str) -> dict[str, list[str]]:
    """The same as a page says it."""
    rows = re.findall(r"^\| (?:SSD, )?(\d+ [KM]iB(?: as \w+)?) \| ([\d.]+) \| ([\d.]+) \| 0\.\d", text, re.MULTILINE)
    return {size: [put, get] for size, put, get in rows}


def test_the_daemons_page_names_what_misses_its_target() -> None:
    rows = sections("daemon")["Put and get, batches of 128"]
    assert listed(speed("daemon")) == missed(rows, "of 1 thread")


def test_the_pools_page_names_what_misses_its_target() -> None:
    found = sections("pool")
    dram = [row for row in found["DRAM, batches of 128"] if row["object"] != "64 KiB"]
    assert missed(dram, "of 1 thread", 0.85) == {}
    assert listed(speed("pool")) == missed(found["SSD, batches of 128"], "of direct I/O", 0.8)


def test_the_daemons_figures_stand_beside_those_of_others() -> None:
    page, found = speed("daemon"), sections("daemon")
    for what in ("put", "get"):
        for given in ("buffers", "rows"):
            rows = [
                row for row in found["Put and get, batches of 128"] if (row["what"], row["given as"]) == (what, given)
            ]
            assert " | ".join([f"| the daemon, {what} of {given}", *(f"{row['GB/s']:.3g}" for row in rows)]) in page
    for row in found["Quoted: peers in DRAM, GB/s"]:
        assert "| " + " | ".join(str(each) for each in row.values()) + " |" in page


def test_sglangs_page_quotes_the_smallest_pages_that_have_a_target() -> None:
    page = " ".join((ROOT / "docs" / "sglang.md").read_text(encoding="utf-8").split())
    (row,) = [
        row
        for row in sections("sglang")["put and get of 128 pages, page_first"]
        if (row["page"], row["backend"]) == ("256 KiB", "umbp")
    ]
    assert f"put {row['put of copy']:.2f} and get {row['get of copy']:.2f} of a bare copy's rate" in page
