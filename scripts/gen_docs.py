"""Rewrites the generated parts of docs/: configuration keys, hooks, command line, the metrics.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``.  ``--check`` changes nothing
and fails when a page is not up to date; a test does the same.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import IntEnum
from pathlib import Path

import typer
import typer.core
import typer.main
from annotated_types import Le
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from umbp_connectors import hookspecs
from umbp_connectors.cli import app
from umbp_connectors.config_model import UmbpConfig, parse_size
from umbp_connectors.doctor.dynamo import MEANINGS
from umbp_connectors.master.metrics_families import FAMILIES, PREFIX, Family
from umbp_connectors.master.settings import MasterConfig
from umbp_core.slot_table import JOINT, LIFE, TRANSACTION, LifeEvent, TransactionEvent
from umbp_sglang.metrics import METRICS, MetricDoc

S = typing.TypeVar("S", bound=IntEnum)
E = typing.TypeVar("E", bound=IntEnum)
DOCS = Path(__file__).resolve().parent.parent / "docs"
_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PLAIN = {bool: "`true` or `false`", int: "number", float: "seconds", str: "text", Path: "path", tuple: "names"}


def hooks() -> list[tuple[str, types.FunctionType]]:
    """Every hook specification, in the order of the file."""
    marked = [(name, value) for name, value in vars(hookspecs).items() if inspect.isfunction(value)]
    return [(name, value) for name, value in marked if name.startswith("umbp_")]


def signature(function: types.FunctionType) -> str:
    """Name and argument names, as the pages show it."""
    return f"{function.__name__}({', '.join(inspect.signature(function).parameters)})"


def kind_of(field: FieldInfo) -> str:
    """What a value of ``field`` looks like."""
    if _is_size(field.metadata):
        return "size"
    if any(isinstance(m, Le) and m.le == 1 for m in field.metadata):
        return "0 to 1"
    return _kind(field.annotation)


def _kind(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return "size" if _is_size(arguments[1:]) else _kind(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return _kind(next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    return _PLAIN[typing.cast("type", origin or annotation)]


def _is_size(metadata: Iterable[object]) -> bool:
    return any(isinstance(each, BeforeValidator) and each.func is parse_size for each in metadata)


def default_of(field: FieldInfo) -> str:
    """The default as one would write it."""
    value = field.default
    if value is None or value in ((), ""):
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if kind_of(field) == "size":
        return f"`{value >> 30}GiB`" if value >> 30 else f"`{value >> 20}MiB`"
    return f"`{value}`"


def configuration_keys(model: type[BaseModel], env_name: Callable[[str], str]) -> str:
    """One row per key."""
    rows = ["| key | environment | value | default | meaning |", "|---|---|---|---|---|"]
    for key, field in model.model_fields.items():
        rows.append(f"| `{key}` | `{env_name(key)}` | {kind_of(field)} | {default_of(field)} | {field.description} |")
    return "\n".join(rows)


def metrics(documented: Iterable[Family | MetricDoc], prefix: str = "") -> str:
    """One row per metric, whose name on the page begins with ``prefix``."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in documented:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        rows.append(f"| `{prefix}{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows)


def dynamo_variables() -> str:
    """One row per variable of Dynamo's KVBM."""
    rows = ["| variable | default there | here |", "|---|---|---|"]
    for name, (default, setting, reason, otherwise) in MEANINGS.items():
        first = f"`{setting.format('VALUE')}`" if setting else ""
        second = f"`{otherwise}` when it is off" if otherwise else ""
        rows.append(f"| `{name}` | `{default}` | {'; '.join(filter(None, (first, second, reason)))} |")
    return "\n".join(rows)


def hook_pages() -> str:
    """One section per hook."""
    parts = []
    for _, function in hooks():
        text = inspect.cleandoc(function.__doc__ or "").replace("``", "`")
        for section in ("Called", "Returns", "Thread & process", "Failure"):
            text = re.sub(rf"^{section}: ", f"- **{section}**: ", text, flags=re.MULTILINE)
        parts.append(f"### `{signature(function)}`\n\n{text}\n")
    return "\n".join(parts)


def command_line() -> str:
    """One section per command, those of a group after its own."""
    return "\n".join(_commands("umbp", typing.cast("typing.Any", typer.main.get_command(app))))


def _commands(path: str, group: typing.Any) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        rows = "".join(map(_parameter, command.params))
        options = f"\n| option | meaning |\n|---|---|\n{rows}" if rows else ""
        yield f"### `{path} {name}`\n\n{inspect.cleandoc(command.help or '')}\n{options}"
        if isinstance(command, typer.core.TyperGroup):
            yield from _commands(f"{path} {name}", command)


def _parameter(parameter: typing.Any) -> str:
    """The row of an option or argument; empty for one that is not for people."""
    if parameter.hidden:
        return ""
    name = parameter.metavar if parameter.param_type_name == "argument" else " ".join(parameter.opts)
    variable = f" Environment: `{parameter.envvar}`." if parameter.envvar else ""
    return f"| `{name}` | {parameter.help}{variable} |\n"


def state_diagram(table: Mapping[S, Mapping[E, S]], joint: Mapping[S, S]) -> str:
    """A table of transitions as a diagram: one arrow per pair of states, with all its events."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for state, events in table.items():
        for event, after in events.items():
            arrows.setdefault((state.name, after.name), []).append(event.name)
    for state, after in joint.items():
        arrows.setdefault((state.name, after.name), []).append("no op is left")
    first, *_ = table
    lines = [f"    [*] --> {first.name}"]
    lines += [f"    {state} --> {after}: {', '.join(events)}" for (state, after), events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def state_table(table: Mapping[S, Mapping[E, S]], events: type[E]) -> str:
    """The same as a matrix: what each event leads to in each state, ``-`` where it is refused."""
    rows = ["| state | " + " | ".join(event.name for event in events) + " |", "|---" * (len(events) + 1) + "|"]
    for state, row in table.items():
        cells = [after.name if (after := row.get(event)) is not None else "-" for event in events]
        rows.append(f"| **{state.name}** | " + " | ".join(cells) + " |")
    return "\n".join(rows)


PARTS: dict[str, Callable[[], str]] = {
    "configuration-keys": lambda: configuration_keys(UmbpConfig, UmbpConfig.env_name),
    "master-keys": lambda: configuration_keys(MasterConfig, MasterConfig.env_name),
    "master-metrics": lambda: metrics(FAMILIES, PREFIX),
    "sglang-metrics": lambda: metrics(METRICS),
    "hooks": hook_pages,
    "command-line": command_line,
    "dynamo-variables": dynamo_variables,
    "slot-life": lambda: state_diagram(LIFE, {life: after for (life, _), after in JOINT.items()}),
    "slot-life-matrix": lambda: state_table(LIFE, LifeEvent),
    "slot-transaction": lambda: state_diagram(TRANSACTION, {}),
    "slot-transaction-matrix": lambda: state_table(TRANSACTION, TransactionEvent),
}


def rewritten(text: str) -> str:
    """``text`` with its generated parts up to date.  Raises ``KeyError`` for a part that nobody generates."""
    return _PART.sub(lambda m: f"{m[1]}\n{PARTS[m['name']]().strip()}\n\n{m[3]}", text)


def main() -> int:
    """Rewrite, or with ``--check`` compare; 1 when something was out of date."""
    check = "--check" in sys.argv[1:]
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = rewritten(before)
        if before != after:
            stale.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
