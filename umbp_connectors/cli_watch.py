"""The command ``umbp watch``: the changes of a master's index, live."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from umbp_connectors.cli_access import MasterAccess, asks_master
from umbp_connectors.cli_tables import console
from umbp_core.errors import ConfigError
from umbp_core.tiers import Tier

if TYPE_CHECKING:
    from umbp_connectors.client.native_async import NativeAsyncClient
    from umbp_connectors.client.watching import Notice
    from umbp_core.index_feed import Change

_SIGNS = {"reported": ("+", "green"), "revoked": ("-", "red"), "cleared": ("x", "bold red")}

NodeFilter = Annotated[
    list[str] | None,
    typer.Option("--node", metavar="NAME", help="Only nodes of this name, or that match a pattern such as `*:dp0:*`."),
]
TierFilter = Annotated[
    list[str] | None, typer.Option("--tier", metavar="TIER", help="Only this tier: HBM, DRAM, SSD; several times.")
]
HashesOption = Annotated[
    int, typer.Option("--hashes", metavar="N", min=0, help="For people: name so many hashes of a change.")
]
ChangesOption = Annotated[int, typer.Option("--changes", metavar="N", min=0, help="End after so many; 0: never.")]


@asks_master
def watch(
    access: MasterAccess,
    node: NodeFilter = None,
    tier: TierFilter = None,
    hashes: HashesOption = 4,
    changes: ChangesOption = 0,
) -> None:
    """Print the changes of a master's index as they come, until Ctrl-C. With --json, one line per change.

    A master that goes away is waited for, and what was missed meanwhile is said. `+` is reported, `-` revoked, and `x`
    a whole tier cleared.
    """
    wanted = _Filter(node or (), [_tier(name) for name in tier or ()])
    tell: Callable[[dict[str, Any]], None] = _tell_programs if access.as_json else _People(hashes)
    try:
        asyncio.run(_follow(access.native_clients(), access.timeout, wanted, tell, changes))
    except KeyboardInterrupt:
        return


async def _follow(
    connect: Sequence[Callable[[], NativeAsyncClient]],
    timeout: float,
    wanted: _Filter,
    tell: Callable[[dict[str, Any]], None],
    limit: int,
) -> None:
    from umbp_connectors.client.watching import Notice, Watcher

    told = 0
    async with aclosing(Watcher(connect, timeout).follow()) as pages:
        async for page in pages:
            if isinstance(page, Notice):
                tell(_notice_values(page))
                continue
            for change in wanted(page.changes):
                tell(_change_values(change))
                told += 1
                if told == limit:
                    return


class _Filter:
    """Lets those changes through that somebody wants to see; all of them where nothing was said."""

    def __init__(self, nodes: Sequence[str], tiers: Sequence[Tier]) -> None:
        self._nodes = nodes
        self._tiers = frozenset(map(int, tiers))

    def __call__(self, changes: Sequence[Change]) -> Iterator[Change]:
        for change in changes:
            named = not self._nodes or any(
                change.node == name or fnmatchcase(change.node, name) for name in self._nodes
            )
            if named and (not self._tiers or change.tier in self._tiers):
                yield change


def _tier(name: str) -> Tier:
    tier = Tier.__members__.get(name.upper())
    if tier is None:
        raise ConfigError(f"--tier {name!r} is not known; give one of {', '.join(Tier.__members__)}")
    return tier


def _change_values(change: Change) -> dict[str, Any]:
    """A change for programs."""
    from umbp_connectors import cli_views as views

    return {
        "event": change.kind.name.lower(),
        "time": round(time.time(), 3),
        "seq": change.seq,
        "node": change.node,
        "tier": views.tier_name(change.tier),
        "hashes": [views.text_of(key) for key in change.hashes],
        "reason": change.reason,
    }


def _notice_values(notice: Notice) -> dict[str, Any]:
    """What became of the watch itself, for programs."""
    return {
        "event": notice.turn.value,
        "time": round(time.time(), 3),
        "seq": notice.seq,
        "master": notice.master,
        "incarnation": notice.incarnation,
        "missed": notice.missed,
        "reason": notice.reason,
    }


def _tell_programs(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


class _People:
    """Prints lines that name ``hashes`` hashes of a change at most."""

    def __init__(self, hashes: int) -> None:
        self._console = console(highlight=False)
        self._hashes = hashes
        self._sentences: dict[str, Callable[[dict[str, Any]], str]] = {
            "connected": lambda told: f"connected to the master at {told['master']}",
            "following": lambda told: f"changes after number {told['seq']:,} follow",
            "missed": lambda told: f"missed {told['missed']:,} changes, which the master keeps no longer",
            "restarted": lambda told: "the master was restarted: nodes tell it anew what they hold",
            "away": lambda told: f"no master answers, trying again: {told['reason']}",
        }

    def __call__(self, told: dict[str, Any]) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(told["time"]))
        sentence = self._sentences.get(told["event"])
        if sentence is not None:
            self._console.print(Text(f"{clock} {sentence(told)}", style="yellow"))
            return
        sign, style = _SIGNS[told["event"]]
        self._console.print(
            Text.assemble(f"{clock} ", (f"{sign} {told['tier']:<4}", style), f" {told['node']} ", self._what(told))
        )

    def _what(self, told: dict[str, Any]) -> str:
        if told["event"] == "cleared":
            return f"everything: {told['reason']}" if told["reason"] else "everything"
        named, count = told["hashes"][: self._hashes], len(told["hashes"])
        more = f" and {count - len(named):,} more" if 0 < len(named) < count else ""
        return " ".join([f"{count:,}:", *named]) + more if named else f"{count:,}"
