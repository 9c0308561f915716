"""The command ``umbp``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from umbp_connectors import cli_ask, cli_daemon, cli_debug, cli_follow, cli_master, cli_pool, cli_watch, cli_why
from umbp_connectors import doctor as examination
from umbp_connectors._version import __version__
from umbp_connectors.cli_entry import run
from umbp_connectors.cli_tables import console, table
from umbp_connectors.config import ResolvedConfig, resolve
from umbp_core.errors import ConfigError

app = typer.Typer(
    name="umbp",
    help="A KV-cache pool for vLLM and SGLang: the master, configuration and diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ExtraOption = Annotated[
    str, typer.Option("--extra", metavar="JSON", help="The engine's extra-config (kv_connector_extra_config).")
]
FileOption = Annotated[
    Path | None, typer.Option("--file", metavar="PATH", help="A TOML file instead of the one that UMBP_CONFIG names.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


@app.command()
def config(extra: ExtraOption = "", file: FileOption = None, as_json: JsonOption = False) -> None:
    """Print every key, its value and where the value came from."""
    resolved = resolve(_extra(extra), file=file)
    if as_json:
        print(json.dumps(_as_json(resolved), indent=2))
        return
    shown = table("key", "value", "from")
    values = _values(resolved)
    for key, origin in resolved.origins.items():
        style = "dim" if origin == "default" else "bold"
        shown.add_row(key, escape(_shown(key, values[key])), escape(origin), style=style)
    console().print(shown)


@app.command()
def doctor(extra: ExtraOption = "", file: FileOption = None, as_json: JsonOption = False) -> None:
    """Say which engines are installed, what is live in them, what does not suit, and what to do about it.

    Exits with 1 when there is a problem, with 0 otherwise.
    """
    out = console(highlight=False)
    findings = []
    for finding in examination.examine(_extra(extra), os.environ, str(file) if file else None):
        findings.append(finding)
        if not as_json:
            style = _STYLES[finding.status.value]
            out.print(f"[{style}]{finding.status.value:>8}[/]  {escape(finding.topic)}: {escape(finding.found)}")
            if finding.advice:
                out.print(f"{'':>8}  -> {escape(finding.advice)}", style="italic")
    if as_json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    problems = sum(finding.status is examination.Status.PROBLEM for finding in findings)
    if not as_json:
        out.print("[green]no problems[/]" if not problems else f"[bold red]{problems} problem(s)[/]")
    raise typer.Exit(1 if problems else 0)


for _command in (cli_master.master, cli_daemon.daemon, cli_ask.nodes, cli_ask.match, cli_ask.hits, cli_ask.top):
    app.command()(_command)
for _command in (cli_watch.watch, cli_follow.follow, cli_why.why):
    app.command()(_command)


app.add_typer(cli_debug.app)
app.add_typer(cli_pool.app)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Entry point of the console script."""
    run(app, "umbp")


def _extra(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError('--extra is not a JSON object, such as \'{"dram_capacity": "8GiB"}\'')
    return value


def _as_json(resolved: ResolvedConfig) -> dict[str, dict[str, Any]]:
    values = _values(resolved)
    return {key: {"value": values[key], "origin": origin} for key, origin in resolved.origins.items()}


def _values(resolved: ResolvedConfig) -> dict[str, Any]:
    """The value of every key; of a secret, only whether there is one."""
    values = resolved.config.model_dump(mode="json")
    secrets = [key for key, field in type(resolved.config).model_fields.items() if not field.repr and values[key]]
    return values | dict.fromkeys(secrets, "(secret)")


def _shown(key: str, value: object) -> str:
    """``value`` as one would write it; a whole number of MiB with its unit."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value)) or ("all" if key == "plugins" else "none")
    if isinstance(value, int) and value >= 1 << 20:
        return f"{value >> 30}GiB" if value % (1 << 30) == 0 else f"{value / 2**20:.4g}MiB ({value})"
    return str(value)
