"""The commands that ask a master: ``umbp nodes``, ``match``, ``hits`` and ``top``."""

from __future__ import annotations

import heapq
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from umbp_connectors.cli_access import HASHES_PER_CALL, LONGEST_S, MasterAccess, asks_master, native_of
from umbp_connectors.cli_tables import console
from umbp_core.errors import ConfigError, MasterUnavailable

if TYPE_CHECKING:
    from umbp_core.master.model import NodeInfo
    from umbp_core.master.transport import MasterTransport, NativeTransport

HashArguments = Annotated[
    list[str], typer.Argument(metavar="HASH...", help="Hashes as the engine publishes them; `-`: from standard input.")
]

OptionalHashArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[HASH...]", help="Hashes as the engine publishes them; `-`: from standard input."),
]
"""Well below what any master lets one question name."""


@asks_master
def nodes(access: MasterAccess) -> None:
    """Show the nodes that a master knows: whether they live, how full they are, and what they hold."""
    from umbp_connectors import cli_views as views

    with access.connected() as transport:
        infos = native_of(transport, "list nodes").list_nodes(access.timeout)
    if access.as_json:
        _print_json([views.node_values(info) for info in infos])
    else:
        _print(views.node_table(infos) if infos else "no nodes")


@asks_master
def match(
    access: MasterAccess,
    hashes: HashArguments,
    prefix: Annotated[
        bool, typer.Option("--prefix", help="The hashes are one chain: how much of its beginning each node has.")
    ] = False,
    count: Annotated[bool, typer.Option("--count", help="Count the matched hashes as hits.")] = False,
    explain: Annotated[
        str, typer.Option("--explain", metavar="NODE", help="Why each hash can, or cannot, be used on this node.")
    ] = "",
) -> None:
    """Ask which nodes hold which of some hashes, on which tiers."""
    keys = _hashes(hashes)
    with access.connected() as transport:
        if explain:
            values, shown = _explained(transport, explain, keys, access.timeout)
        elif prefix:
            values, shown = _prefixes(transport, keys, access.timeout)
        else:
            values, shown = _matches(transport, keys, count, access.timeout)
    if access.as_json:
        _print_json(values)
    else:
        _print(shown if values else "no node holds any of them")


@asks_master
def hits(
    access: MasterAccess,
    hashes: OptionalHashArguments = None,
    most: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Without hashes: show so many.")] = 20,
    scan: Annotated[
        int, typer.Option("--scan", metavar="N", min=1, help="Without hashes: look at so many at most.")
    ] = 100_000,
) -> None:
    """Show how often hashes were matched; those without a counter are left out.

    Without hashes, the most often matched ones of those that nodes hold.
    """
    from umbp_connectors import cli_views as views

    keys = _hashes(hashes) if hashes else []
    with access.connected() as transport:
        if keys:
            counts = transport.hit_counts(keys, access.timeout)
        else:
            held = islice(_held(native_of(transport, "list hashes"), access.timeout), scan)
            counts = _most_matched(transport, held, most, access.timeout)
    if access.as_json:
        _print_json([{"hash": views.text_of(key), "hits": number} for key, number in counts])
    else:
        _print(views.hit_table(counts) if counts else "no hash of these has a counter")


@asks_master
def top(
    access: MasterAccess,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, max=LONGEST_S, help="Time between two looks.")
    ] = 1.0,
    looks: Annotated[int, typer.Option("--looks", metavar="N", min=0, help="End after so many; 0: never.")] = 0,
) -> None:
    """Watch a master's nodes live, until Ctrl-C. With --json, one line per look.

    A master that goes away is waited for.
    """
    with access.connected() as transport:
        client = native_of(transport, "list nodes")
        look = _Look(lambda: client.list_nodes(access.timeout))
        rounds = iter(int, 1) if looks == 0 else iter(range(looks))
        pause = threading.Event()
        try:
            if access.as_json:
                for _ in rounds:
                    print(json.dumps(look.values()), flush=True)
                    pause.wait(interval)
            else:
                with Live(console=console(highlight=False), auto_refresh=False, screen=False) as live:
                    for _ in rounds:
                        live.update(look.view(), refresh=True)
                        pause.wait(interval)
        except KeyboardInterrupt:
            return


def _held(client: NativeTransport, timeout: float) -> Iterator[bytes]:
    """The hashes that nodes hold, node by node; some of them several times."""
    for info in client.list_nodes(timeout):
        for tier in info.external_counts:
            cursor = 0
            while True:
                page = client.list_blocks(info.node_id, tier, cursor, HASHES_PER_CALL, timeout)
                yield from page.hashes
                cursor = page.cursor
                if not cursor:
                    break


def _most_matched(
    transport: MasterTransport, hashes: Iterator[bytes], most: int, timeout: float
) -> list[tuple[bytes, int]]:
    counts: dict[bytes, int] = {}
    while batch := list(islice(hashes, HASHES_PER_CALL)):
        counts.update(transport.hit_counts(batch, timeout))
    return heapq.nsmallest(most, counts.items(), key=lambda item: (-item[1], item[0]))


class _Look:
    """What a master's nodes hold now, and how that changed since the last look."""

    def __init__(self, ask: Callable[[], list[NodeInfo]]) -> None:
        self._ask = ask
        self._held: dict[str, int] = {}
        self._at = 0.0

    def values(self) -> dict[str, Any]:
        """For programs; ``error`` says why there are no nodes."""
        from umbp_connectors import cli_views as views

        try:
            infos = self._ask()
        except MasterUnavailable as error:
            return {"error": str(error), "nodes": []}
        rates = self._rates(infos)
        return {
            "error": "",
            "nodes": [views.node_values(info) | {"change_per_s": round(rates[info.node_id], 3)} for info in infos],
        }

    def view(self) -> Group:
        """For people."""
        from umbp_connectors import cli_views as views
        from umbp_core.master.model import NodeStatus

        try:
            infos = self._ask()
        except MasterUnavailable as error:
            return Group(Text(str(error), style="red"))
        alive = sum(info.status is NodeStatus.ALIVE for info in infos)
        held = sum(sum(info.external_counts.values()) for info in infos)
        owned = sum(sum(info.block_counts.values()) for info in infos)
        summary = f"{alive} of {len(infos)} nodes alive, {owned:,} blocks, {held:,} external"
        return Group(Text(summary, style="bold"), views.node_table(infos, self._rates(infos)))

    def _rates(self, infos: Sequence[NodeInfo]) -> dict[str, float]:
        now, before = monotonic(), self._held
        self._held = {
            info.node_id: sum(info.block_counts.values()) + sum(info.external_counts.values()) for info in infos
        }
        seconds, self._at = now - self._at, now
        return {node: (held - before.get(node, held)) / seconds for node, held in self._held.items()}


def _matches(transport: MasterTransport, keys: list[bytes], count: bool, timeout: float) -> tuple[list[Any], Any]:
    from umbp_connectors import cli_views as views

    found = transport.match(keys, count, timeout)
    return [views.match_values(each) for each in found], views.match_table(found, len(keys))


def _prefixes(transport: MasterTransport, keys: list[bytes], timeout: float) -> tuple[list[Any], Any]:
    from umbp_connectors import cli_views as views
    from umbp_connectors.client.dialects import dialect_of

    found = dialect_of(transport).match_prefix(keys, None, timeout)
    return [views.prefix_values(each) for each in found], views.prefix_table(found, len(keys))


def _explained(transport: MasterTransport, node: str, keys: list[bytes], timeout: float) -> tuple[list[Any], Any]:
    from umbp_connectors import cli_views as views

    client = native_of(transport, "explain")
    values = [views.explanation_values(key, client.explain(node, key, timeout)) for key in keys]
    return values, Text("\n".join(f"{value['hash']}: {value['text']}" for value in values))


def _hashes(given: Sequence[str]) -> list[bytes]:
    texts = sys.stdin.read().split() if list(given) == ["-"] else given
    if not texts:
        raise ConfigError("no hashes on standard input; give one per line")
    return [text.encode() for text in texts]


def _print_json(values: object) -> None:
    print(json.dumps(values, indent=2))


def _print(shown: Any) -> None:
    console(highlight=False).print(shown)
