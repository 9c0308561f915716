"""``docs/protocol.md`` says what the codecs do: every message, field, bound, code and written-down exchange."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import msgspec
import pytest

from umbp_core.wire import bounds, frames, hashes, messages, replies
from umbp_core.wire.codes import ErrorCode

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
GOLDEN = ROOT / "tests" / "core" / "wire" / "golden"
WORDS = {
    "Text": "text", "LongText": "text", "Token": "bytes", "EngineDesc": "bytes", "Packed": "list",
    "Column": "column", "Bitmap": "bitmap", "Count": "int", "SmallCount": "int", "TierNumber": "tier",
    "Tags": "[text]", "Names": "[text]", "Capacities": "[capacity]", "TierCounts": "{tier: int}",
    "TierWeights": "{tier: float}", "None": "nil",
    "AnyText": "text", "AnyTags": "[text]", "AnyCapacities": "[capacity]", "AnyTierCounts": "{tier: int}",
}  # fmt: skip
STRUCTS: list[type[msgspec.Struct]] = [
    kind
    for module in (messages, replies)
    for kind in vars(module).values()
    if inspect.isclass(kind) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
    if kind is not messages.Message
]


def word(annotation: str) -> str:
    """A type as the page has it."""
    plain = re.sub(r"Annotated\[(.*), Meta\(.*\)\]", r"\1", annotation)
    rows = re.sub(r"tuple\[tuple\[Text, Text\], \.\.\.\]", "[[text, text]]", plain)
    rows = re.sub(r"tuple\[(\w+), \.\.\.\]", lambda match: f"[{WORDS.get(match[1], match[1])}]", rows)
    return " or ".join(WORDS.get(part, part) for part in rows.split(" | "))


def default(value: object) -> str:
    """A default as the page has it; empty where there is none."""
    if value is msgspec.NODEFAULT:
        return ""
    shown = {"b''": '""', "''": '""', "()": "[]", "None": "nil", "False": "false"}
    return f" = {shown.get(repr(value), value)}"


def fields(kind: type[msgspec.Struct]) -> str:
    """The fields of a struct as the page has them."""
    return "; ".join(
        f"`{field.name}` {word(kind.__annotations__[field.name])}{default(field.default)}"
        for field in msgspec.structs.fields(kind)
    )


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_message_is_described_field_by_field(kind: type[msgspec.Struct]) -> None:
    number = kind.__struct_config__.tag
    start = f"| `{kind.__name__}` |" if number is None else f"| {number} | `{kind.__name__}` |"
    assert f"{start} {fields(kind)} |".replace("|  |", "| |") in PAGE


def test_no_message_is_described_that_does_not_exist() -> None:
    described = set(re.findall(r"^\| (?:\d+ \| )?`([A-Z]\w+)` \| (?:`|\|)", PAGE, re.MULTILINE))
    assert described == {kind.__name__ for kind in STRUCTS}


@pytest.mark.parametrize("name", bounds.TABLE)
def test_bound_is_in_the_table(name: str) -> None:
    assert f"| {name} | {bounds.TABLE[name]:,} |" in PAGE


def test_the_table_has_every_bound_and_no_other() -> None:
    constants = {name for name in vars(bounds) if name.isupper() and name not in ("MIB", "TABLE")}
    assert constants == set(bounds.TABLE) == set(re.findall(r"^\| ([A-Z_]{4,}) \| [\d,]+ \|", PAGE, re.MULTILINE))


@pytest.mark.parametrize("code", ErrorCode)
def test_error_code_is_described(code: ErrorCode) -> None:
    assert f"| {code.value} | {code.name} |" in PAGE


@pytest.mark.parametrize("kind", frames.FrameType)
def test_frame_type_is_described(kind: frames.FrameType) -> None:
    assert f"| {kind.value} | {kind.name} |" in PAGE


@pytest.mark.parametrize("mode", hashes.Packing)
def test_packing_mode_is_described(mode: hashes.Packing) -> None:
    assert f"| {mode.value} | {mode.name} |" in PAGE


def test_versions_are_the_ones_that_are_spoken() -> None:
    assert f"version {frames.VERSION} of the frames and revision {messages.REVISION} of the messages" in PAGE


def test_written_down_exchanges_are_listed() -> None:
    listed = re.findall(r"`(\d\d-[a-z-]+)`", PAGE)
    assert listed == sorted(path.stem for path in GOLDEN.glob("*.hex"))


@pytest.mark.parametrize("name", ["01-hello", "06-match"])
def test_exchange_that_is_shown_is_the_one_that_is_written_down(name: str) -> None:
    assert (GOLDEN / f"{name}.hex").read_text(encoding="utf-8") in PAGE
