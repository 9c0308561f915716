"""The commands ``umbp master`` and ``umbp-master``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from umbp_connectors import cli_entry
from umbp_connectors.cli_tables import console, table

MASTER_PANEL = "Where it listens"
STATE_PANEL = "What it remembers"
SECURITY_PANEL = "Who may use it"

ListenOption = Annotated[
    str | None,
    typer.Option("--listen", metavar="HOST:PORT", help="UMBP's gRPC; `none`: nowhere.", rich_help_panel=MASTER_PANEL),
]
NativeListenOption = Annotated[
    str | None,
    typer.Option(
        "--native-listen",
        metavar="HOST:PORT",
        help="The native protocol; `none`, `auto`.",
        rich_help_panel=MASTER_PANEL,
    ),
]
NativeSocketOption = Annotated[
    Path | None,
    typer.Option(
        "--native-socket", metavar="PATH", help="Unix socket of the native protocol.", rich_help_panel=MASTER_PANEL
    ),
]
MetricsListenOption = Annotated[
    str | None,
    typer.Option(
        "--metrics-listen", metavar="HOST:PORT", help="Metrics and health; `none`.", rich_help_panel=MASTER_PANEL
    ),
]
StateDirOption = Annotated[
    str | None,
    typer.Option(
        "--state-dir", metavar="PATH", help="Folder of the table of nodes; `none`.", rich_help_panel=STATE_PANEL
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--metadata-backend", metavar="NAME", help="`embedded`, `redis` or `none`.", rich_help_panel=STATE_PANEL
    ),
]
RedisOption = Annotated[
    str | None,
    typer.Option("--redis-uri", metavar="URI", help="The Redis or Valkey to use.", rich_help_panel=STATE_PANEL),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file", metavar="PATH", help="The token that clients have to send.", rich_help_panel=SECURITY_PANEL
    ),
]
CertOption = Annotated[
    Path | None,
    typer.Option("--tls-cert", metavar="PATH", help="Certificate chain, PEM.", rich_help_panel=SECURITY_PANEL),
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--tls-key", metavar="PATH", help="Private key, PEM.", rich_help_panel=SECURITY_PANEL),
]
ClientCaOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-client-ca",
        metavar="PATH",
        help="Clients need a certificate that this one signed.",
        rich_help_panel=SECURITY_PANEL,
    ),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="PATH", help="TOML file with any of the keys.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration; may be given several times."),
]
ShowOption = Annotated[
    bool, typer.Option("--show-config", help="Print every key, its value and where it came from; start nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output of --show-config.")]


def master(
    listen: ListenOption = None,
    native_listen: NativeListenOption = None,
    native_socket: NativeSocketOption = None,
    metrics_listen: MetricsListenOption = None,
    state_dir: StateDirOption = None,
    metadata_backend: BackendOption = None,
    redis_uri: RedisOption = None,
    token_file: TokenFileOption = None,
    tls_cert: CertOption = None,
    tls_key: KeyOption = None,
    tls_client_ca: ClientCaOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    show_config: ShowOption = False,
    as_json: JsonOption = False,
) -> None:
    """Serve a master: which node holds which block on which tier.

    Serves UMBP's gRPC and the native protocol until it gets SIGTERM or SIGINT. What is not given here comes from the
    environment (UMBP_*), the file, or the defaults.
    """
    options = {
        "listen": listen,
        "native_listen": native_listen,
        "native_socket": native_socket,
        "metrics_listen": metrics_listen,
        "state_dir": state_dir,
        "metadata_backend": metadata_backend,
        "redis_uri": redis_uri,
        "token_file": token_file,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "config_file": config,
    }
    run(options, settings or [], {}, show_config, as_json)


def run(
    options: Mapping[str, Any], settings: list[str], defaults: Mapping[str, str], show_config: bool, as_json: bool
) -> None:
    """Be the master that all of this describes, or show the description.  Raises ``UmbpError``."""
    from umbp_connectors.master.settings import resolve

    resolved = resolve(_with_settings(options, settings), defaults=defaults)
    if show_config:
        _show(resolved, as_json)
        return
    from umbp_connectors.master.process import serve

    serve(resolved.config, os.environ)


def _with_settings(options: Mapping[str, Any], settings: list[str]) -> dict[str, Any]:
    """``options`` as text, and what ``--set`` says; the latter counts."""
    given = {key: str(value) for key, value in options.items() if value is not None}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE", param_hint="--set")
        given[key.strip()] = value
    return given


def _show(resolved: Any, as_json: bool) -> None:
    from umbp_connectors.master.settings import MasterConfig

    values = resolved.config.model_dump(mode="json")
    secret = [key for key, field in MasterConfig.model_fields.items() if not field.repr and values[key]]
    values |= dict.fromkeys(secret, "(secret)")
    if as_json:
        told = {key: {"value": values[key], "origin": origin} for key, origin in resolved.origins.items()}
        print(json.dumps(told, indent=2))
        return
    rows = table("key", "value", "from", "environment")
    for key, origin in resolved.origins.items():
        shown = "not set" if values[key] in (None, "") else str(values[key])
        style = "dim" if origin == "default" else "bold"
        rows.add_row(key, escape(shown), escape(origin), MasterConfig.env_name(key), style=style)
    console().print(rows)


ORIGINAL_LISTEN = "0.0.0.0:50051"

_positional = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@_positional.command(name="umbp-master")
def positional(
    listen: Annotated[
        str | None, typer.Argument(metavar="LISTEN", help="HOST:PORT of gRPC.", show_default=ORIGINAL_LISTEN)
    ] = None,
    metrics_port: Annotated[
        str | None,
        typer.Argument(
            metavar="METRICS_PORT",
            help="Port of /metrics on this machine only, or HOST:PORT; 0: none.",
            show_default="9091",
        ),
    ] = None,
    settings: SetOption = None,
    config: ConfigOption = None,
) -> None:
    """Serve a master in the place of UMBP's own, with its arguments and defaults.

    Everything else is configured by the environment (UMBP_*), a file, or --set; see `umbp master --show-config`.
    """
    options = {"listen": listen, "metrics_listen": _metrics_address(metrics_port), "config_file": config}
    run(options, settings or [], {"listen": ORIGINAL_LISTEN, "native_listen": "auto"}, False, False)


def _metrics_address(text: str | None) -> str | None:
    if text is None or not text.isdigit():
        return text
    return "none" if int(text) == 0 else f"127.0.0.1:{text}"


def main() -> None:
    """Entry point of ``umbp-master``."""
    cli_entry.run(_positional, "umbp-master")
