"""The page of the daemon names its metrics and its keys, as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.follower import SILENT_S
from umbp_connectors.daemon.messages import GREETING_BYTES, REVISION
from umbp_connectors.daemon.metrics import FAMILIES, Family
from umbp_connectors.daemon.process import PREDECESSOR_S
from umbp_connectors.daemon.server import DRAIN_S, LEASE_S, MAX_STRANGERS
from umbp_connectors.daemon.session import TALK_S
from umbp_connectors.daemon.settings import STARTED_BY_ENGINE_IDLE_S
from umbp_connectors.daemon.watches import MOST_WAITING
from umbp_connectors.pool.local import CLOSE_TIMEOUT_S

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "daemon.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_metrics_are_on_the_page(family: Family) -> None:
    labels = ", ".join(f"`{label}`" for label in family.labels) or "-"
    assert f"| `{family.name}` | {labels} | {family.meaning} |" in PAGE


def test_keys_are_on_the_page() -> None:
    keys = [key for key in UmbpConfig.model_fields if key.startswith("daemon_")]
    assert keys
    assert [key for key in keys if f"`{key}`" not in PAGE] == []


def test_times_are_those_of_the_code() -> None:
    assert f"lease ends after {LEASE_S:.0f} s" in PAGE
    assert f"get {DRAIN_S:.0f} s, then" in PAGE
    assert f"for up to {CLOSE_TIMEOUT_S:.0f} s" in PAGE
    assert f"for up to {PREDECESSOR_S:.0f} s, and its log" in PAGE
    assert f"or {STARTED_BY_ENGINE_IDLE_S:.0f} for one that an engine started" in PAGE
    assert REVISION == 2
    assert f"one frame of at most {GREETING_BYTES >> 10} KiB and gives it\n  {TALK_S:.0f} s;" in PAGE
    assert f"no more than {MAX_STRANGERS} connections" in PAGE
    assert f"says nothing for {SILENT_S:.0f} s" in PAGE
    assert f"({MOST_WAITING} changed blocks wait)" in PAGE
