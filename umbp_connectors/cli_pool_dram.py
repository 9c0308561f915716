"""``umbp pool ls --tier dram``: asks the host's daemon what it has in memory."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from umbp_connectors.cli_views import size_text
from umbp_connectors.config import resolve
from umbp_connectors.daemon.link import list_objects
from umbp_connectors.daemon.listing import ListObjects
from umbp_connectors.daemon.settings import socket_path
from umbp_core.errors import TierUnavailable

_ANSWER_S = 10.0


def show(socket: Path | None, wanted: ListObjects, as_json: bool) -> None:
    """Print the objects that ``wanted`` describes.  Raises ``TierUnavailable`` when no daemon answers."""
    path = socket_path(resolve({"daemon_socket": str(socket)} if socket else {}).config)
    try:
        listing = list_objects(path, wanted, time.monotonic() + _ANSWER_S)
    except OSError as error:
        raise TierUnavailable(f"no daemon answers at {path} ({error}); name another one with --socket") from error
    if as_json:
        told = [
            {
                "key": each.key.hex(),
                "bytes": each.nbytes,
                "depth": each.depth,
                "page": each.page,
                "tier": "DRAM",
                "pool": each.pool,
                "namespace": each.namespace,
            }
            for each in listing.objects
        ]
        print(json.dumps(told, indent=2))
        return
    table = Table("key", "size", "depth", "page", "pool", "namespace", box=box.SIMPLE, pad_edge=False)
    for each in listing.objects:
        row = each.key.hex(), size_text(each.nbytes), str(each.depth), str(each.page), each.pool
        table.add_row(*row, escape(each.namespace))
    console = Console(soft_wrap=True)
    console.print(table)
    if listing.found > len(listing.objects):
        console.print(f"{listing.found - len(listing.objects):,} more; see --limit")
