"""The page of SGLang says what the adapter does: keys, forms, switches, metrics, and figures of the benchmark."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from umbp_connectors.config import UmbpConfig
from umbp_sglang import allocator, registration
from umbp_sglang.hooks import OPTION
from umbp_sglang.settings import ENGINE_KEYS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "sglang.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "sglang.json"
SIZES = {"4GiB": 4 << 30, "32GiB": 32 << 30}


def section(heading: str) -> str:
    return PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables in ``text``, without the headings' rules."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def extra_configs(text: str) -> list[dict[str, object]]:
    """Every extra configuration that a command in ``text`` gives, as the shell would hand it over."""
    commands = [block.replace("\\\n", " ") for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]
    words = [word for block in commands for word in shlex.split(block)]
    option = "--hicache-storage-backend-extra-config"
    return [json.loads(words[at + 1]) for at, word in enumerate(words) if word == option]


def test_every_extra_configuration_that_is_shown_can_be_used() -> None:
    shown = extra_configs(PAGE) + extra_configs((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(shown) == 3
    for extra in shown:
        UmbpConfig(**{key: value for key, value in extra.items() if key not in ENGINE_KEYS})  # type: ignore[arg-type]


def test_the_form_without_hooks_is_the_one_that_the_log_recommends() -> None:
    (recommended,) = extra_configs("    " + registration.DYNAMIC + "\n")
    assert any(recommended.items() <= extra.items() for extra in extra_configs(PAGE))


def test_our_keys_are_there_with_their_defaults() -> None:
    ours, engines = section("Extra configuration").split("These belong to SGLang")
    found = {name: cells[1] for cells in rows(ours) for name in re.findall(r"`(\w+)`", cells[0])}
    assert len(found) > 5
    defaults = UmbpConfig()
    for name, said in found.items():
        value = getattr(defaults, name)
        word = said.strip("`")
        if word in SIZES:
            assert value == SIZES[word], name
        elif word in {"none", "empty"}:
            assert not value, name
        elif word == "off":
            assert value in {False, -1}, name
        else:
            assert (",".join(value) if isinstance(value, tuple) else str(value)) == word, name
    foreign = {name for cells in rows(engines) for name in re.findall(r"`(\w+)`", cells[0])}
    named_elsewhere = {"backend_name", "module_path", "class_name", "interface_v1"}
    assert foreign | named_elsewhere == ENGINE_KEYS


def test_switches_and_options_are_named_as_they_are() -> None:
    for name in (registration.NO_HOOKS, registration.OVERRIDE, OPTION):
        assert f"`{name}" in PAGE
    assert f'`"{allocator.KEY}": "{allocator.SHARED}"`' in PAGE
    assert f"`{registration.STORE_CLASS}`" in PAGE


def test_the_hooks_are_as_many_as_the_page_says() -> None:
    words = ["no", "one", "two", "three", "four", "five", "six"]
    more = words[len(registration.REPORTING_HOOKS)]
    assert f"The hooks are {words[1 + len(registration.MORE_HOOKS)]}, and {more} more" in PAGE


def test_metrics_that_the_page_names_are_in_the_table_of_metrics() -> None:
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(umbp_sglang_[a-z_]+_total)\b", PAGE))
    assert named
    assert {name for name in named if f"| `{name}` |" not in table} == set()


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "page_head", "layer_first"])
def test_every_layout_has_its_costs(layout: str) -> None:
    assert any(cells[0] == f"`{layout}`" for cells in rows(section("What is stored, and what it costs")))
    (measured,) = [
        row
        for rows_of_one in json.loads(RESULTS.read_text(encoding="utf-8"))["sections"].values()
        for row in rows_of_one
        if row.get("layout") == layout
    ]
    assert measured["put, GB/s"] > 0
    assert measured["get, GB/s"] > 0
