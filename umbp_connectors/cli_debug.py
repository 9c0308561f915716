"""The commands ``umbp debug ...``: what live engines are doing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from umbp_connectors.cli_access import LONGEST_S
from umbp_connectors.cli_tables import console, table
from umbp_core.errors import UmbpError

app = typer.Typer(name="debug", help="Look into live engines: what every request, op and thread is doing.")

PidOption = Annotated[int | None, typer.Option("--pid", metavar="N", help="Only this process.")]
DirOption = Annotated[
    Path | None, typer.Option("--dir", metavar="PATH", help="The doors' folder, where it is not that of this user.")
]
RequestOption = Annotated[str, typer.Option("--request", metavar="ID", help="Only requests whose id contains this.")]
StacksOption = Annotated[bool, typer.Option("--stacks", help="Also where every thread is.")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.1, max=LONGEST_S, help="How long to wait.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output: a list with an entry per door.")]


@app.callback()
def debug() -> None:
    """Look into live engines: what every request, op and thread is doing."""


@app.command()
def dump(
    pid: PidOption = None,
    folder: DirOption = None,
    request: RequestOption = "",
    stacks: StacksOption = False,
    timeout: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Print the state of every live engine of this user: requests, ops in flight with their age, pins, tiers.

    Exits with 1 when no engine answers. An engine has a door unless its `debug_socket` is false.
    """
    from umbp_connectors.debug.asking import NoAnswer, ask, doors
    from umbp_connectors.debug.door import Question, folder_of

    where = folder if folder is not None else folder_of()
    answers: list[dict[str, Any]] = []
    silent: list[UmbpError] = []
    for path in doors(where, pid):
        try:
            answer = ask(path, Question(stacks=stacks), timeout)
        except NoAnswer as error:
            silent.append(error)
            continue
        if answer is not None:
            answers.append(only(answer, request))
    out = console(highlight=False)
    if as_json:
        print(json.dumps(answers, indent=2))
    else:
        for answer in answers:
            for part in shown(answer):
                out.print(part)
    for problem in silent:
        Console(stderr=True, soft_wrap=True).print(f"umbp: {escape(str(problem))}")
    if not answers:
        if not silent:
            Console(stderr=True, soft_wrap=True).print(f"umbp: no live engine has a door in {escape(str(where))}")
        raise typer.Exit(1)


def only(answer: dict[str, Any], request: str) -> dict[str, Any]:
    """``answer`` without the requests and ops that are not about ``request``."""
    if request:
        for part in ("requests", "ops"):
            answer[part] = [row for row in answer.get(part, ()) if any(request in str(row.get(key)) for key in _ABOUT)]
    return answer


_ABOUT = ("request", "requests", "slot")


def shown(answer: Mapping[str, Any]) -> Iterator[Any]:
    """``answer`` for people: single values on one line each, lists of rows as tables."""
    yield f"[bold]{escape(str(answer.get('door')))}[/] of process {answer.get('pid')}"
    for name, value in answer.items():
        if name in ("door", "pid", "threads"):
            continue
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield _table(name, value)
        else:
            yield f"  {name}: {escape(_words(value))}"
    for name, frames in answer.get("threads", {}).items():
        yield f"  thread [bold]{escape(name)}[/]"
        for frame in frames:
            yield f"    {escape(frame)}"


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = table(*columns, title=f"{name} ({len(rows)})", title_justify="left")
    for row in rows:
        shown.add_row(*(escape(_words(row.get(column, ""))) for column in columns))
    return shown


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "-"
    return "-" if value is None or value == "" else str(value)
