"""The command ``umbp daemon``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umbp_core.errors import UmbpError

if TYPE_CHECKING:
    from umbp_connectors.daemon.doors import Door
    from umbp_connectors.daemon.messages import Overview

_STATUS_S = 5.0

SocketOption = Annotated[
    Path | None, typer.Option("--socket", metavar="PATH", help="Its Unix socket; the key daemon_socket.")
]
DramOption = Annotated[
    str | None, typer.Option("--dram-capacity", metavar="SIZE", help="DRAM of all pools together, such as 64GiB.")
]
SsdDirOption = Annotated[Path | None, typer.Option("--ssd-dir", metavar="PATH", help="Folder of the SSD tier.")]
SsdOption = Annotated[str | None, typer.Option("--ssd-capacity", metavar="SIZE", help="Bound of everything below it.")]
IdleOption = Annotated[
    float | None,
    typer.Option("--idle-exit", metavar="SECONDS", min=0, help="End after so long without clients; 0: never."),
]
QuotaOption = Annotated[
    str | None, typer.Option("--quota", metavar="SIZE", help="The most DRAM that one namespace gets.")
]
MetricsOption = Annotated[
    str | None, typer.Option("--metrics-listen", metavar="HOST:PORT", help="Serve Prometheus metrics there.")
]
ListenOption = Annotated[
    str | None,
    typer.Option("--listen", metavar="HOST:PORT", help="Serve clients of this host over TCP, too, with a token."),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="For --status: ask over TCP; the key daemon_address."),
]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", metavar="PATH", help="File with the token of --listen and --address.")
]
FileOption = Annotated[Path | None, typer.Option("--config", metavar="PATH", help="TOML file with any of the keys.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration; may be given several times."),
]
StatusOption = Annotated[
    bool, typer.Option("--status", help="Show the pools and clients of the daemon that runs; start nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output of --status.")]


def daemon(
    socket: SocketOption = None,
    dram_capacity: DramOption = None,
    ssd_dir: SsdDirOption = None,
    ssd_capacity: SsdOption = None,
    idle_exit: IdleOption = None,
    quota: QuotaOption = None,
    metrics_listen: MetricsOption = None,
    listen: ListenOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
    config: FileOption = None,
    settings: SetOption = None,
    status: StatusOption = False,
    as_json: JsonOption = False,
) -> None:
    """Keep the KV of this host's engines in memory and on SSD while they come and go.

    Engines with `mode` `daemon` map its memory and copy by themselves. It serves until SIGTERM or SIGINT, and then
    lets calls end and writes to SSD what is in DRAM only. What is not given here comes from the environment (UMBP_*),
    the file, or the defaults. --status exits with 1 when no daemon answers.
    """
    from umbp_connectors.config import COMMAND_LINE, resolve
    from umbp_connectors.daemon.settings import door_of, socket_path

    options = {
        "daemon_socket": socket,
        "dram_capacity": dram_capacity,
        "ssd_dir": ssd_dir,
        "ssd_capacity": ssd_capacity,
        "daemon_idle_exit_s": idle_exit,
        "daemon_quota": quota,
        "daemon_metrics_listen": metrics_listen,
        "daemon_listen": listen,
        "daemon_address": address,
        "daemon_token_file": token_file,
    }
    resolved = resolve(_given(options, settings or []), file=config, giver=COMMAND_LINE).config
    if status:
        by_socket = socket is not None and address is None
        raise typer.Exit(_show_status(socket_path(resolved) if by_socket else door_of(resolved), as_json))
    from umbp_connectors.daemon.process import serve

    serve(resolved, socket_path(resolved))


def _given(options: dict[str, Any], settings: list[str]) -> dict[str, str]:
    """``options`` as text, and what ``--set`` says; the latter counts."""
    given = {key: str(value) for key, value in options.items() if value is not None}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE", param_hint="--set")
        given[key.strip()] = value
    return given


def _show_status(door: Door, as_json: bool) -> int:
    from umbp_connectors.daemon.link import inspect

    try:
        overview = inspect(door, time.monotonic() + _STATUS_S)
    except (OSError, UmbpError) as error:
        print(f"umbp: no daemon answers at {door}: {error}", file=sys.stderr)
        return 1
    if as_json:
        import msgspec

        told = msgspec.structs.asdict(overview) | {"pools": msgspec.to_builtins(overview.pools), "socket": str(door)}
        print(json.dumps(told, indent=2))
    else:
        _print(door, overview)
    return 0


def _print(door: Door, overview: Overview) -> None:
    from rich.markup import escape

    from umbp_connectors.cli_tables import console, table
    from umbp_core.tiers import Tier

    out = console(highlight=False)
    used = sum(pool.dram_bytes for pool in overview.pools)
    out.print(
        f"daemon {overview.pid} at {escape(str(door))}: {len(overview.pools)} pool(s), "
        f"{used / 2**30:.2f} of {overview.dram_bytes / 2**30:.2f} GiB DRAM given out"
    )
    rows = table("pool", "namespace", "page", "DRAM", "SSD", "hits", "clients")
    for pool in overview.pools:
        fills = {fill.tier: f"{fill.objects}/{fill.total_pages}" for fill in pool.fills}
        rows.add_row(
            pool.identity[:12],
            escape(pool.namespace),
            f"{pool.page_bytes / 2**10:.0f}KiB",
            fills.get(Tier.DRAM, "none"),
            fills.get(Tier.SSD, "none"),
            str(pool.counters.get("get_dram", 0) + pool.counters.get("get_ssd", 0)),
            escape(", ".join(pool.clients)) or "none",
        )
    out.print(rows)
