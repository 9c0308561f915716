"""The commands ``umbp pool ...``: what lies in an SSD folder, whether it is sound, and how fast this machine is."""

from __future__ import annotations

import enum
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from umbp_connectors.cli_pool_rows import stats_of, values_of
from umbp_connectors.cli_pool_wanted import Wanted, age_text, closed_folders, key_of, size_of
from umbp_connectors.cli_tables import console, table
from umbp_core.errors import ConfigError

if TYPE_CHECKING:
    from umbp_connectors.pool.inspection import StoredCatalogue, StoredObject

app = typer.Typer(name="pool", help="Look into an SSD folder, check it, clean it, and measure this machine.")

DirOption = Annotated[
    Path | None, typer.Option("--dir", metavar="PATH", help="The SSD folder; otherwise that of the configuration.")
]
NameOption = Annotated[
    str, typer.Option("--name", metavar="TEXT", help="Only catalogues whose namespace or path contains this.")
]
PrefixOption = Annotated[
    str, typer.Option("--prefix", metavar="KEY", help="Only objects whose key begins so: hexadecimal, or text.")
]
OlderOption = Annotated[
    str,
    typer.Option("--older-than", metavar="TIME", help="Only what was written longer ago, such as 90s, 30m, 2h, 7d."),
]
NewerOption = Annotated[str, typer.Option("--newer-than", metavar="TIME", help="Only what was written since.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
SocketOption = Annotated[
    Path | None, typer.Option("--socket", metavar="PATH", help="The daemon's, where one uses the folder.")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do it; without, say what would be done.")]


_COPIES = 4
"""So often an object has memory while it is measured: twice in the pool, and on both sides of it."""


class Where(str, enum.Enum):
    """A tier to look into."""

    DRAM = "dram"
    SSD = "ssd"


TierOption = Annotated[Where, typer.Option("--tier", help="`dram`: what the host's daemon has in memory.")]
DramSocketOption = Annotated[Path | None, typer.Option("--socket", metavar="PATH", help="The daemon's; for `dram`.")]


@app.callback()
def pool() -> None:
    """Look into an SSD folder, check it, clean it, and measure this machine.

    What only reads may be used while an engine runs. What changes something asks the host's daemon where that uses the
    folder, and is refused where an engine does by itself.
    """


@app.command()
def stats(folder: DirOption = None, name: NameOption = "", as_json: JsonOption = False) -> None:
    """Show what lies in the SSD folder: objects, bytes and slots of every catalogue, and who uses it.

    `fill` is what the objects have of their slots; the rest is lost to sizes that differ.
    """
    from umbp_connectors.cli_views import size_text
    from umbp_connectors.pool.inspection import unreadable_catalogues

    where = _folder(folder)
    rows = [stats_of(catalogue) for catalogue in _catalogues(where, name)]
    lost = [str(path) for path in (*unreadable_catalogues(where), *closed_folders(where))]
    if as_json:
        print(json.dumps({"catalogues": rows, "unreadable": lost}, indent=2))
        return
    shown = table("catalogue", "namespace", "objects", "bytes", "fill", "slots", "files", "used")
    for row in rows:
        slots = f"{row['slots']:,}" if row["slots"] is not None else "-"
        use = "by an engine" if row["in_use"] else "no"
        fill = "-" if row["fill"] is None else f"{row['fill']:.0%}"
        sizes = size_text(row["bytes"]), fill, slots, size_text(row["file_bytes"])
        shown.add_row(escape(row["catalogue"]), escape(row["namespace"]), f"{row['objects']:,}", *sizes, use)
    out = console()
    out.print(shown)
    for path in lost:
        out.print(f"[yellow]unreadable[/]  {escape(path)}")


@app.command()
def ls(
    folder: DirOption = None,
    name: NameOption = "",
    prefix: PrefixOption = "",
    min_size: Annotated[str, typer.Option("--min-size", metavar="SIZE", help="Only objects at least so large.")] = "",
    max_size: Annotated[str, typer.Option("--max-size", metavar="SIZE", help="Only objects at most so large.")] = "",
    older_than: OlderOption = "",
    newer_than: NewerOption = "",
    limit: Annotated[int, typer.Option("--limit", min=0, help="So many objects at most; 0: all.")] = 100,
    tier: TierOption = Where.SSD,
    socket: DramSocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """List objects, the latest first: key, size, place in its prefix chain, age (on SSD), slot or page."""
    from umbp_connectors.cli_views import size_text

    wanted = Wanted(prefix, older_than, newer_than, min_size, max_size)
    if tier is Where.DRAM:
        if folder or older_than or newer_than:
            raise ConfigError("DRAM is the daemon's and knows no ages: leave out --dir, --older-than and --newer-than")
        from umbp_connectors.cli_pool_daemon import show

        show(socket, wanted.in_memory(name, limit), as_json)
        return
    where = _folder(folder)
    found = [pair for catalogue in _catalogues(where, name) for pair in _matching(catalogue, wanted)]
    _tell_unseen(where)
    found.sort(key=lambda pair: pair[1].written or 0.0, reverse=True)
    shown = found[:limit] if limit else found
    if as_json:
        print(json.dumps([values_of(catalogue, stored) for catalogue, stored in shown], indent=2))
        return
    rows = table("key", "size", "depth", "age", "slot", "catalogue")
    for catalogue, stored in shown:
        age = "-" if stored.written is None else age_text(time.time() - stored.written)
        sizes = size_text(stored.nbytes), str(stored.depth), age, str(stored.slot)
        rows.add_row(stored.key.hex(), *sizes, escape(catalogue.name))
    out = console()
    out.print(rows)
    if len(shown) < len(found):
        out.print(f"{len(found) - len(shown):,} more; see --limit")


@app.command()
def get(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="The object's key, hexadecimal as `umbp pool ls` shows it.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where its bytes go.")],
    folder: DirOption = None,
    name: NameOption = "",
    rank: Annotated[int, typer.Option("--rank", min=0, help="Whose part, where ranks share a catalogue.")] = 0,
    tier: TierOption = Where.SSD,
    socket: DramSocketOption = None,
) -> None:
    """Write the verified bytes of one object to a file.

    With `--tier dram` the host's daemon gives what it has in memory: all ranks' parts, one after the other.
    """
    from umbp_connectors.pool.maintenance import load

    wanted = key_of(key)
    if tier is Where.DRAM:
        from umbp_connectors import cli_pool_daemon

        _check_no_folder(folder)
        size = output.write_bytes(cli_pool_daemon.fetch(socket, name, wanted))
        print(f"{size} bytes of {key} are in {output}")
        return
    where = _folder(folder)
    for catalogue in _catalogues(where, name):
        for stored in catalogue.objects():
            if stored.key == wanted:
                data = load(catalogue, stored, rank)
                output.write_bytes(data)
                print(f"{len(data)} bytes of {key} are in {output}")
                return
    _tell_unseen(where)
    raise ConfigError(f"no catalogue has the object {key}; `umbp pool ls` lists what there is")


@app.command()
def verify(
    folder: DirOption = None,
    name: NameOption = "",
    tier: TierOption = Where.SSD,
    socket: DramSocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read everything on SSD and compare checksums. Exits with 1 when something is not as it should be.

    With `--tier dram` the host's daemon does so with its memory, and forgets what is not what was stored.
    """
    if tier is Where.DRAM:
        from umbp_connectors import cli_pool_daemon

        _check_no_folder(folder)
        raise typer.Exit(0 if cli_pool_daemon.verify(socket, name, as_json) else 1)
    from umbp_connectors.cli_views import size_text
    from umbp_connectors.pool.inspection import unreadable_catalogues
    from umbp_connectors.pool.maintenance import verify as walk

    where = _folder(folder)
    catalogues = _catalogues(where, name)
    verdicts = [(catalogue, walk(catalogue)) for catalogue in catalogues]
    lost = [str(path) for path in (*unreadable_catalogues(where), *closed_folders(where))]
    problems = [problem for _, verdict in verdicts for problem in verdict.problems]
    if as_json:
        rows = [
            {
                "catalogue": catalogue.name,
                "objects": verdict.objects,
                "bytes": verdict.nbytes,
                "unverifiable": verdict.unverifiable,
                "problems": verdict.problems,
            }
            for catalogue, verdict in verdicts
        ]
        print(json.dumps({"catalogues": rows, "unreadable": lost}, indent=2))
    else:
        for catalogue, verdict in verdicts:
            sound = verdict.objects - verdict.unverifiable - len(verdict.bad)
            told = f"{sound:,} of {verdict.objects:,} objects ({size_text(verdict.nbytes)}) are what was stored"
            print(f"{catalogue.name}: {told}")
        for problem in [*problems, *(f"{path} cannot be read" for path in lost)]:
            print(f"  {problem}", file=sys.stderr)
    raise typer.Exit(1 if problems or lost else 0)


@app.command()
def evict(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY...]", help="Keys, hexadecimal.")] = None,
    folder: DirOption = None,
    name: NameOption = "",
    prefix: PrefixOption = "",
    older_than: OlderOption = "",
    socket: SocketOption = None,
    yes: YesOption = False,
) -> None:
    """Take objects off the SSD: those that are named, or that begin so, or that are old.

    The daemon, where one uses the folder, forgets them in memory too. No other engine may use it.
    """
    from umbp_connectors import cli_pool_daemon
    from umbp_connectors.pool import maintenance

    if not keys and not prefix and not older_than:
        raise ConfigError("say what is to go: keys, --prefix or --older-than; `umbp pool clear` takes everything")
    named = {key_of(key) for key in keys or ()}
    wanted, where = Wanted(prefix, older_than), _folder(folder)
    for catalogue in _catalogues(where, name):
        gone = [stored.key for _, stored in _matching(catalogue, wanted) if not named or stored.key in named]
        if not yes:
            print(f"{catalogue.name}: {len(gone):,} objects would go; say --yes")
        elif gone and catalogue.in_use:
            print(f"{catalogue.name}: {cli_pool_daemon.evict(socket, where, catalogue, gone):,} objects are gone")
        else:
            count = maintenance.evict(catalogue, gone) if gone else 0
            print(f"{catalogue.name}: {count:,} objects are gone")
    raise typer.Exit(_tell_unseen(where))


@app.command()
def clear(folder: DirOption = None, name: NameOption = "", socket: SocketOption = None, yes: YesOption = False) -> None:
    """Remove everything from the SSD folder, files included.

    The daemon, where one uses them, forgets what is in its pools and keeps its files. No other engine may use it.
    """
    from umbp_connectors import cli_pool_daemon
    from umbp_connectors.cli_views import size_text
    from umbp_connectors.pool import maintenance

    where = _folder(folder)
    catalogues = _catalogues(where, name)
    if not yes:
        for catalogue in catalogues:
            row = stats_of(catalogue)
            print(f"{catalogue.name}: {row['objects']:,} objects would go; say --yes")
        raise typer.Exit(_tell_unseen(where))
    for catalogue in catalogues:
        if catalogue.in_use:
            cli_pool_daemon.clear(socket, where, catalogue)
            print(f"{catalogue.name}: all objects are gone; its files are the daemon's")
    unused = [catalogue for catalogue in catalogues if not catalogue.in_use]
    print(f"{size_text(maintenance.clear(unused))} are free again")
    raise typer.Exit(_tell_unseen(where))


@app.command()
def bench(
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="PATH", help="Measure SSD too, in a folder of its own there.")
    ] = None,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Bytes of an object.")] = "1MiB",
    objects: Annotated[int, typer.Option("--objects", min=1, help="Objects per call.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Calls of each kind; the median counts.")] = 5,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads that copy or wait for the disk.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Measure put, get and exists beside what memory and disk give in the same minute."""
    from umbp_connectors.pool.bench import measure

    nbytes = size_of(size) or 1
    _check_memory(_COPIES * nbytes * objects)
    figures = measure(nbytes, objects, rounds, threads, folder)
    if as_json:
        rows = [
            {"what": f.what, "value": f.value, "unit": f.unit, "ceiling": f.ceiling, "ratio": f.ratio} for f in figures
        ]
        print(json.dumps(rows, indent=2))
        return
    shown = table("what", "measured", "ceiling", "ratio")
    for figure in figures:
        ceiling = "-" if figure.ceiling is None else f"{figure.ceiling:.2f} {figure.unit}"
        ratio = "-" if figure.ratio is None else f"{figure.ratio:.2f}"
        shown.add_row(figure.what, f"{figure.value:.2f} {figure.unit}", ceiling, ratio)
    console().print(shown)


def _check_memory(nbytes: int) -> None:
    from umbp_connectors.pool import machine

    limits = machine.memory_limits()
    if nbytes > limits.usable:
        raise ConfigError(
            f"objects that need {nbytes / 2**30:.1f} GiB do not fit this machine, which has {limits.describe()}; "
            "give a smaller --size or fewer --objects"
        )


def _tell_unseen(folder: Path) -> int:
    """Say on standard error what of ``folder`` cannot be read; the exit code, 1 where there is any.

    What an engine moved aside does not count.
    """
    from umbp_connectors.pool.inspection import unreadable_catalogues

    unreadable = unreadable_catalogues(folder)
    unseen = [*(path for path in unreadable if path.suffix == ".sqlite"), *closed_folders(folder)]
    for path in unseen:
        print(f"umbp: {path} cannot be read, and was left out", file=sys.stderr)
    return 1 if unseen else 0


def _check_no_folder(folder: Path | None) -> None:
    if folder:
        raise ConfigError("DRAM is the daemon's: leave out --dir, and name it with --socket")


def _folder(given: Path | None) -> Path:
    if given is not None:
        return given
    from umbp_connectors.config import resolve

    configured = resolve().config.ssd_dir
    if configured is None:
        raise ConfigError("no SSD folder is configured; name one with --dir")
    return configured


def _catalogues(folder: Path, name: str) -> list[StoredCatalogue]:
    from umbp_connectors.pool.inspection import find_catalogues
    from umbp_connectors.pool.maintenance import catalogues_below

    found = catalogues_below(find_catalogues(folder), name)
    if not found:
        named = f" whose namespace or path contains {name!r}" if name else ""
        print(f"umbp: there is no catalogue below {folder}{named}", file=sys.stderr)
    return found


def _matching(catalogue: StoredCatalogue, wanted: Wanted) -> Iterator[tuple[StoredCatalogue, StoredObject]]:
    return ((catalogue, stored) for stored in catalogue.objects() if wanted.matches(stored))
