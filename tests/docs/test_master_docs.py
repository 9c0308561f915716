"""The pages and the dashboard of the master say what the code does: every key, metric, command and bound."""

import json
import re
from pathlib import Path

import pytest
import typer

from tests.master.app.test_metrics_page import REPORTED_COUNTERS, REPORTED_HISTOGRAMS
from umbp_connectors import cli
from umbp_connectors.config_env import FOREIGN
from umbp_connectors.master import metrics_nodes, security
from umbp_connectors.master.metrics_families import FAMILIES, PREFIX, Family
from umbp_connectors.master.settings import ENV_KEYS, KEYS, MasterConfig

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "examples" / "monitoring" / "umbp-master.json"
REPORTED = (*REPORTED_COUNTERS, *REPORTED_HISTOGRAMS, "ssd_staging_slots_in_use")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("key", KEYS)
def test_key_of_the_master_is_documented_with_its_variable(key: str) -> None:
    assert f"| `{key}` | `{MasterConfig.env_name(key)}` |" in page("master-configuration.md")
    assert MasterConfig.model_fields[key].description


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_metric_of_the_master_is_documented(family: Family) -> None:
    assert f"| `{PREFIX}{family.name}` | {family.kind} |" in page("metrics.md")


@pytest.mark.parametrize("name", REPORTED)
def test_metric_that_nodes_report_is_documented(name: str) -> None:
    assert f"`{name}`" in page("metrics.md").partition("### Reported by nodes")[2]


def test_bounds_in_the_text_are_those_of_the_code() -> None:
    assert f"above {metrics_nodes.MAX_SERIES_PER_NODE} series of one node or" in page("metrics.md").replace("\n", " ")
    assert f"{metrics_nodes.MAX_SERIES:,}".replace(",", " ") in page("metrics.md")
    assert f"at most {security.MAX_TOKEN} printable ASCII" in page("master.md")


def test_defaults_in_the_text_are_those_of_the_code() -> None:
    config = MasterConfig()
    for address in (config.listen, config.native_listen, config.metrics_listen):
        assert f"`{address}`" in page("master.md")


def test_variables_that_the_page_of_the_master_names_exist() -> None:
    text = page("master.md") + page("master-configuration.md")
    named = set(re.findall(r"`(UMBP_[A-Z_]+)", text))
    known = {
        *ENV_KEYS,
        *FOREIGN,
        "UMBP_REDIS_SHARD_URIS",
        "UMBP_DRAM_CAPACITY",
        "UMBP_MASTER_ADDRESS",
        "UMBP_MASTER_TLS_CA",
    }
    assert named - known == {"UMBP_HEARTBEAT_TTL_SECS", "UMBP_MASTER_"} & named


def test_every_option_of_every_command_is_documented() -> None:
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        section = page("cli.md").partition(f"### `umbp {name}`\n")[2].partition("\n### ")[0]
        assert section, name
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert f"| `{parameter.opts[0]}` |" in section, (name, parameter.opts)


def test_the_dashboard_shows_metrics_that_exist_by_labels_that_they_have() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 20
    labels = {family.name: {*family.labels, "job", "le"} for family in FAMILIES}
    labels |= {name: {"job", "le", "node", "traffic", "rpc", "status"} for name in REPORTED}
    for expression in expressions:
        names = re.findall(rf"{PREFIX}(\w+)", expression)
        assert names or "process_" in expression
        families = {name if name in labels else re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
        known = {"job"}.union(*(labels[family] for family in families))
        used = re.findall(r"[{,](\w+)[=!]", expression)
        used += [label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")]
        assert set(used) <= known, expression
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_page_of_the_master_shows_the_ready_line_as_it_is() -> None:
    from umbp_connectors.master.app import Doors
    from umbp_connectors.master.settings import parse_endpoint

    config = MasterConfig()
    doors = Doors(
        parse_endpoint(config.listen),
        parse_endpoint(config.native_listen),
        parse_endpoint(config.metrics_listen),
        0,
        None,
    )
    assert f"umbp master ready: {doors}\n" in page("master.md")
