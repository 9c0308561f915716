"""What ``umbp pool`` asks the host's daemon: what it has in memory, if that is sound, and to forget what it uses."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from rich.markup import escape

from umbp_connectors.cli_tables import console, table
from umbp_connectors.cli_views import size_text
from umbp_connectors.config import COMMAND_LINE, resolve
from umbp_connectors.daemon.doors import Door
from umbp_connectors.daemon.link import ManagingLink, fetch_object, list_objects, manage, verify_objects
from umbp_connectors.daemon.listing import ListObjects, VerifiedPool
from umbp_connectors.daemon.settings import door_of, socket_path
from umbp_connectors.pool.inspection import StoredCatalogue
from umbp_core.errors import ConfigError, StateError, TierUnavailable
from umbp_core.wire.codes import WireError

Told = TypeVar("Told")

_ANSWER_S = 10.0
_VERIFY_S = 600.0
"""How long it may look at its memory."""
_FLUSH_S = 20.0
"""How long the daemon's disk may take."""


def show(socket: Path | None, wanted: ListObjects, as_json: bool) -> None:
    """Print the objects that ``wanted`` describes.  Raises ``TierUnavailable`` when no daemon answers."""
    listing = _asked(socket, lambda door: list_objects(door, wanted, time.monotonic() + _ANSWER_S))
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
    rows = table("key", "size", "depth", "page", "pool", "namespace")
    for each in listing.objects:
        row = each.key.hex(), size_text(each.nbytes), str(each.depth), str(each.page), each.pool
        rows.add_row(*row, escape(each.namespace))
    out = console()
    out.print(rows)
    if listing.found > len(listing.objects):
        out.print(f"{listing.found - len(listing.objects):,} more; see --limit")


def verify(socket: Path | None, name: str, as_json: bool) -> bool:
    """Have the daemon compare checksums of what it has in memory, and print what it found; whether all is sound.

    Raises ``TierUnavailable`` when no daemon answers.
    """
    last = time.monotonic() + _VERIFY_S + _ANSWER_S
    found = _asked(socket, lambda door: verify_objects(door, name, _VERIFY_S, last))
    if as_json:
        rows = [
            {
                "pool": each.pool,
                "namespace": each.namespace,
                "objects": each.objects,
                "bytes": each.nbytes,
                "problems": _problems(each),
            }
            for each in found.pools
        ]
        print(json.dumps({"pools": rows, "complete": found.complete}, indent=2))
    else:
        for each in found.pools:
            sound = each.objects - each.unsound
            told = f"{sound:,} of {each.objects:,} objects ({size_text(each.nbytes)}) are what was stored"
            print(f"{each.pool} {each.namespace}: {told}")
            for problem in _problems(each):
                print(f"  {problem}", file=sys.stderr)
        if not found.complete:
            print(f"  not everything was looked at in {_VERIFY_S:.0f} s", file=sys.stderr)
    return found.complete and not any(each.unsound for each in found.pools)


def fetch(socket: Path | None, name: str, key: bytes) -> bytes:
    """The verified bytes of an object that a daemon has in memory, in a pool whose namespace contains ``name``.

    Raises ``ConfigError`` unless exactly one pool has it, ``TierUnavailable`` when no daemon answers.
    """
    pools, data = _asked(socket, lambda door: fetch_object(door, name, key, time.monotonic() + _ANSWER_S))
    if pools > 1:
        raise ConfigError(
            f"{pools} pools of the daemon have the object {key.hex()}; say with --name which one is meant"
        )
    if not pools:
        raise ConfigError(
            f"the daemon has no object {key.hex()} in memory that is what was stored; "
            "`umbp pool ls --tier dram` lists what there is"
        )
    return data


def _problems(verdict: VerifiedPool) -> list[str]:
    more = verdict.unsound - len(verdict.keys)
    named = [f"object {key.hex()} was not what was stored, and is forgotten" for key in verdict.keys]
    return [*named, f"{more:,} more were not"] if more else named


def evict(socket: Path | None, folder: Path, catalogue: StoredCatalogue, keys: Sequence[bytes]) -> int:
    """Have the daemon forget ``keys`` of a catalogue in ``folder`` that is in use; how many of them there were.

    Raises ``StateError`` when no daemon uses it, ``TierUnavailable`` when its disk takes nothing.
    """
    return _ordered(socket, folder, catalogue, lambda link, deadline: link.evict(keys, deadline))


def clear(socket: Path | None, folder: Path, catalogue: StoredCatalogue) -> int:
    """The same for everything; how many copies there were, in memory and on SSD."""
    return _ordered(socket, folder, catalogue, lambda link, deadline: link.clear(deadline))


def _ordered(
    socket: Path | None, folder: Path, catalogue: StoredCatalogue, order: Callable[[ManagingLink, float], int]
) -> int:
    door, deadline = _door(socket), time.monotonic() + _ANSWER_S
    try:
        with closing(manage(door, catalogue.identity, folder, deadline)) as link:
            gone = order(link, deadline)
            written = link.flush(_FLUSH_S, time.monotonic() + _FLUSH_S + _ANSWER_S)
    except (OSError, WireError, TierUnavailable) as error:
        raise StateError(
            f"{catalogue.name} is in use, and not by a daemon that answers at {door} ({error}): end the engine first, "
            "or name the daemon with --socket"
        ) from error
    if not written:
        raise TierUnavailable(f"{gone} objects are gone from the daemon; its disk has not taken note of it yet")
    return gone


def _asked(socket: Path | None, ask: Callable[[Door], Told]) -> Told:
    door = _door(socket)
    try:
        return ask(door)
    except OSError as error:
        raise TierUnavailable(f"no daemon answers at {door} ({error}); name another one with --socket") from error


def _door(socket: Path | None) -> Door:
    """At ``socket``, or where the configuration says."""
    if socket is not None:
        return socket_path(resolve({"daemon_socket": str(socket)}, giver=COMMAND_LINE).config)
    return door_of(resolve().config)
