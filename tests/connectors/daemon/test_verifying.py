"""``umbp pool verify --tier dram``: the daemon looks itself whether its memory holds what was stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.commands import umbp
from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.engine import soon
from tests.connectors.daemon.kit import IDENTITY, SIZE, get, key_of, put
from tests.connectors.daemon.test_kept import GREETING
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.link import attach, list_objects, verify_objects
from umbp_connectors.daemon.listing import ListObjects
from umbp_connectors.daemon.messages import REVISION
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.ids import Identity
from umbp_core.tiers import Tier

Verify = Callable[..., tuple[int, Any]]


@pytest.fixture
def verify(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """The exit code of the command, and what it says, as a value when it was asked for JSON."""

    def verify(*arguments: str) -> tuple[int, Any]:
        return umbp(monkeypatch, capsys, "pool", "verify", "--tier", "dram", "--socket", str(path), *arguments)

    return verify


def flip(path: Path, number: int) -> None:
    """Change a bit of an object in the daemon's memory, which every client can write to."""
    listing = list_objects(path, ListObjects(REVISION, int(Tier.DRAM)), time.monotonic() + 30)
    (page,) = (each.page for each in listing.objects if each.key == key_of(number))
    with closing(attach(path, GREETING, None, False, soon())) as link:
        link.arena.pages[page, SIZE // 2] ^= 1


def test_what_is_sound(start: Callable[..., Daemon], connect: Callable[..., DaemonPool], verify: Verify) -> None:
    start()
    pool, other = connect(), connect(Identity("another", IDENTITY.layout, IDENTITY.rank))
    assert put(pool, range(5)) == [PutStatus.STORED] * 5
    assert other.put([b"key"], [bytes(100)]) == [PutStatus.STORED]
    code, said = verify("--json")
    assert (code, said["complete"]) == (0, True)
    rows = {row["namespace"]: (row["objects"], row["bytes"], row["problems"]) for row in said["pools"]}
    assert rows == {"shared": (5, 5 * SIZE, []), "another": (1, 100, [])}
    code, said = verify("--name", "anoth")
    assert (code, "1 of 1 objects" in said, "5 of 5" in said) == (0, True, False)
    assert get(pool, range(5)) == [GetStatus.DRAM] * 5


@pytest.mark.parametrize("ssd", [False, True])
def test_what_is_not_is_named_and_forgotten(
    start: Callable[..., Daemon],
    connect: Callable[..., DaemonPool],
    verify: Verify,
    path: Path,
    tmp_path: Path,
    ssd: bool,
) -> None:
    start(**({"ssd_dir": tmp_path / "ssd", "ssd_capacity": 8 << 20} if ssd else {}))
    pool = connect()
    assert put(pool, range(5)) == [PutStatus.STORED] * 5
    assert pool.flush(30)
    flip(path, 3)
    code, said = verify()
    assert code == 1
    assert "4 of 5 objects" in said
    assert f"object {key_of(3).hex()} was not what was stored" in said
    code, said = verify("--json")
    assert (code, said["pools"][0]["objects"], said["pools"][0]["problems"]) == (0, 4, [])
    found = GetStatus.SSD if ssd else GetStatus.MISS
    assert get(pool, range(5)) == [GetStatus.DRAM] * 3 + [found, GetStatus.DRAM]


def test_time_that_runs_out_is_told(
    start: Callable[..., Daemon], connect: Callable[..., DaemonPool], path: Path
) -> None:
    start()
    put(connect(), range(5))
    found = verify_objects(path, "", 0, time.monotonic() + 30)
    assert (found.complete, [each.objects for each in found.pools]) == (False, [0])
    assert verify_objects(path, "", 30, time.monotonic() + 60).complete


def test_without_a_daemon_and_with_a_folder_it_says_so(verify: Verify, path: Path) -> None:
    code, said = verify()
    assert (code != 0, f"no daemon answers at {path}" in said) == (True, True)
    code, said = verify("--dir", "x")
    assert (code != 0, "leave out --dir" in said) == (True, True)
