"""Every statement of the connector's checklist is cited by a test or excused, and every known bug has its test.

Tests cite with ``@pytest.mark.statement("connector", 17)`` and ``@pytest.mark.bug("B7")``.  Their sources are read, not
imported: most of them need an engine.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "connector-protocol.md"

STATEMENTS = frozenset({*map(str, range(1, 103)), "58a", "58b"})
BUGS = frozenset(f"B{number}" for number in range(1, 17))

Citations = dict[str, list[str]]


def cited(mark: str) -> Citations:
    """Who cites what: the last argument of every ``pytest.mark.<mark>(...)`` in the tests, with where it stands."""
    found: Citations = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        if f"mark.{mark}(" in source:
            for call in calls_of(ast.parse(source), mark):
                arguments = [ast.literal_eval(argument) for argument in call.args]
                where = f"{path.relative_to(ROOT)}:{call.lineno}"
                assert call.keywords == [], where
                found[str(arguments[-1])].append(where)
                if mark == "statement":
                    assert arguments[:-1] == ["connector"], where
    return found


def calls_of(tree: ast.Module, mark: str) -> Iterator[ast.Call]:
    """The markers in ``tree``; one on what is no test proves nothing and is refused."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for decorator in filter(lambda found: is_mark(found, mark), node.decorator_list):
                assert node.name.startswith(("test", "Test")), f"{node.name} is marked and is no test"
                assert isinstance(decorator, ast.Call)
        if is_mark(node, mark):
            assert isinstance(node, ast.Call)
            yield node


def is_mark(node: ast.AST, mark: str) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == mark):
        return False
    return isinstance(node.func.value, ast.Attribute) and node.func.value.attr == "mark"


def table(heading: str) -> list[list[str]]:
    """The rows of the table below ``heading`` of the page, without its head."""
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, heading
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]]


def excused() -> dict[str, str]:
    rows = table("Statements that do not apply")
    assert len({number for number, _ in rows}) == len(rows), "a statement is excused once"
    return {row[0]: row[1] for row in rows}


def test_every_statement_is_proven_or_excused() -> None:
    proven, without = set(cited("statement")), set(excused())
    assert sorted(STATEMENTS - proven - without) == [], "neither cited by a test nor in the table of the page"
    assert {number: cited("statement")[number] for number in proven & without} == {}, "cited and excused"
    assert (proven | without) - STATEMENTS == set(), "no such statement"


def test_the_page_lists_every_statement_and_every_bug_once() -> None:
    for heading, names in (("The statements", STATEMENTS), ("Bugs that must not come back", BUGS)):
        listed = [row[0] for row in table(heading)]
        assert (sorted(listed), len(set(listed))) == (sorted(names), len(names)), heading


def test_an_excuse_is_a_sentence() -> None:
    assert [number for number, reason in excused().items() if len(reason.split()) < 5] == []


def test_what_differs_is_proven_as_far_as_it_goes_and_has_a_reason() -> None:
    rows = table("Where it differs from the checklist")
    numbers = [number for number, _, _ in rows]
    assert len(set(numbers)) == len(numbers), "a difference is told once"
    assert set(numbers) <= set(cited("statement")), "what holds of it has a test"
    assert [row for row in rows if len(row[1].split()) < 4 or len(row[2].split()) < 8] == []


def test_every_bug_has_a_test_that_fails_on_it() -> None:
    assert set(cited("bug")) == BUGS


@pytest.mark.parametrize(
    "source", ["@pytest.mark.bug('B1')\ndef helper(): ...", "@pytest.mark.bug('B1')\nclass Base: ..."]
)
def test_a_marker_on_what_is_no_test_is_refused(source: str) -> None:
    with pytest.raises(AssertionError, match="is no test"):
        list(calls_of(ast.parse(source), "bug"))
