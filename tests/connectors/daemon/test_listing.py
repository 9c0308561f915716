"""What the daemon has in memory, seen from the command line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.commands import umbp
from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import IDENTITY, SIZE, key_of, object_of, put
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.link import list_objects
from umbp_connectors.daemon.listing import OBJECTS, ListObjects
from umbp_connectors.daemon.messages import REVISION
from umbp_core.errors import UmbpError
from umbp_core.ids import Identity
from umbp_core.outcomes import PutStatus
from umbp_core.tiers import Tier

Run = Callable[..., tuple[int, Any]]
Ls = Callable[..., list[dict[str, object]]]


@pytest.fixture
def run(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The exit code of `umbp pool ls --tier dram`, and what it says."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> tuple[int, Any]:
        return umbp(monkeypatch, capsys, "pool", "ls", "--tier", "dram", "--socket", str(path), *arguments)

    return run


@pytest.fixture
def ls(run: Run) -> Ls:
    def ls(*arguments: str) -> list[dict[str, object]]:
        code, rows = run("--json", *arguments)
        assert code == 0, rows
        told: list[dict[str, object]] = rows
        return told

    return ls


def test_objects_in_memory_by_prefix_size_and_namespace(
    start: Callable[..., Daemon], connect: Callable[..., DaemonPool], ls: Ls
) -> None:
    start()
    pool, other = connect(), connect(Identity("another", IDENTITY.layout, IDENTITY.rank))
    assert put(pool, range(5)) == [PutStatus.STORED] * 5
    assert other.put([b"key"], [object_of(1, 100)], [7]) == [PutStatus.STORED]
    rows = ls()
    assert len(rows) == 6
    assert {row["key"] for row in rows} == {key_of(number).hex() for number in range(5)} | {b"key".hex()}
    (small,) = ls("--max-size", "200")
    assert (small["key"], small["bytes"], small["depth"]) == (b"key".hex(), 100, 7)
    assert (small["namespace"], small["tier"]) == ("another", "DRAM")
    assert [row["key"] for row in ls("--prefix", key_of(3).hex())] == [key_of(3).hex()]
    assert [row["key"] for row in ls("--prefix", "key")] == [b"key".hex()]
    assert len(ls("--name", "shared", "--min-size", str(SIZE))) == 5
    assert [row["key"] for row in ls("--name", "shared", "--limit", "2")] == [key_of(4).hex(), key_of(3).hex()]
    pool.clear()
    assert [row["key"] for row in ls()] == [b"key".hex()]


def test_for_people_it_is_a_table(start: Callable[..., Daemon], connect: Callable[..., DaemonPool], run: Run) -> None:
    start()
    put(connect(), range(5))
    code, said = run("--limit", "3")
    assert code == 0
    assert key_of(4).hex() in said
    assert "2 more; see --limit" in said


@pytest.mark.parametrize("more", [["--older-than", "1h"], ["--newer-than", "1h"], ["--dir", "x"]])
def test_memory_knows_no_ages_and_no_folder(more: list[str], run: Run) -> None:
    code, said = run(*more)
    assert code
    assert "leave out" in said


def test_without_a_daemon_it_says_so(run: Run, path: Path) -> None:
    code, said = run()
    assert code
    assert f"no daemon answers at {path}" in said


def test_a_question_that_cannot_be_is_refused(
    start: Callable[..., Daemon], connect: Callable[..., DaemonPool], path: Path
) -> None:
    start()
    put(connect(), range(3))
    deadline = time.monotonic() + 30
    assert list_objects(path, ListObjects(REVISION, 99), deadline).found == 0
    assert list_objects(path, ListObjects(REVISION, int(Tier.DRAM), limit=0), deadline).objects == []
    for wrong in (ListObjects(REVISION + 1, 2), ListObjects(REVISION, 2, limit=OBJECTS + 1)):
        with pytest.raises((UmbpError, ConnectionError)):
            list_objects(path, wrong, deadline)
