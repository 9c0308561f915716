"""The page of the client says what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from umbp_connectors.client.addresses import parse_addresses
from umbp_connectors.client.master_client import MasterClient
from umbp_connectors.client.settings import ClientSettings

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "master-client.md").read_text(encoding="utf-8")


def test_every_setting_is_on_the_page_with_its_default() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", PAGE, re.MULTILINE))
    backoff = ClientSettings().backoff
    defaults = {field.name: getattr(ClientSettings(), field.name) for field in dataclasses.fields(ClientSettings)}
    del defaults["backoff"]
    assert {name: float(value) for name, value in table.items()} == defaults
    assert f"pauses from {backoff.first:g} s, doubling to {backoff.ceiling:g} s" in PAGE


def test_the_methods_that_the_page_names_exist() -> None:
    public = {name for name in vars(MasterClient) if not name.startswith("_")}
    assert public == {name for name in public if f"`{name}" in PAGE or f"client.{name}(" in PAGE}


def test_the_example_runs_without_a_master(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    text = code[1]
    addresses = re.search(r'"(umbp://[^"]+)"', text)
    assert addresses is not None
    assert len(parse_addresses(addresses[1])) == 2
    exec(compile(text.replace(addresses[1], "umbp://127.0.0.1:9"), "master-client.md", "exec"), {})
    assert capsys.readouterr().out == ""
