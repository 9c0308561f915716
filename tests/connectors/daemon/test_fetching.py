"""``umbp pool get --tier dram``: an object's bytes out of the daemon's memory, verified."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.connectors.commands import umbp
from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import IDENTITY, get, key_of, object_of, put
from tests.connectors.daemon.test_verifying import flip
from umbp_connectors.daemon import link as links
from umbp_connectors.daemon.client import DaemonClientConfig, DaemonPool
from umbp_connectors.daemon.link import fetch_object
from umbp_connectors.daemon.listing import PART_BYTES, FetchedPart
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.ids import Identity

Fetch = Callable[..., tuple[int, str]]


@pytest.fixture
def fetch(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fetch:
    """The exit code of the command and what it says; the bytes are in ``out``."""

    def fetch(key: bytes, *arguments: str) -> tuple[int, str]:
        command = ("pool", "get", key.hex(), "--output", str(tmp_path / "out"), "--tier", "dram")
        return umbp(monkeypatch, capsys, *command, "--socket", str(path), *arguments)

    return fetch


def test_the_bytes_are_those_that_were_stored(
    start: Callable[..., Daemon], connect: Callable[..., DaemonPool], fetch: Fetch, tmp_path: Path
) -> None:
    start()
    assert put(connect(), range(5)) == [PutStatus.STORED] * 5
    code, said = fetch(key_of(3))
    assert (code, f"bytes of {key_of(3).hex()} are in" in said) == (0, True)
    assert (tmp_path / "out").read_bytes() == object_of(3)


@pytest.mark.parametrize("nbytes", [PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 77])
def test_an_object_of_several_parts(start: Callable[..., Daemon], path: Path, nbytes: int) -> None:
    start(dram_capacity=64 << 20)
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8).tobytes()
    pool = DaemonPool(IDENTITY, DaemonClientConfig(path, nbytes, 4 * (nbytes + 4096), timeout_s=30, prefault=False))
    pool.open()
    assert pool.put([b"key"], [data]) == [PutStatus.STORED]
    assert fetch_object(path, "", b"key", time.monotonic() + 30) == (1, data)
    pool.close()


def test_what_is_not_there_is_said(
    start: Callable[..., Daemon], connect: Callable[..., DaemonPool], fetch: Fetch
) -> None:
    start()
    put(connect(), [1])
    code, said = fetch(key_of(2))
    assert (code, f"no object {key_of(2).hex()} in memory" in said) == (2, True)
    code, said = fetch(key_of(1), "--name", "nobody's")
    assert (code, "no object" in said) == (2, True)
    code, said = fetch(key_of(1), "--dir", "somewhere")
    assert (code, "leave out --dir" in said) == (2, True)


def test_of_several_pools_the_name_says_which(
    start: Callable[..., Daemon], connect: Callable[..., DaemonPool], fetch: Fetch, tmp_path: Path
) -> None:
    start()
    one, other = connect(), connect(Identity("another", IDENTITY.layout, IDENTITY.rank))
    assert one.put([b"key"], [b"one's"]) == other.put([b"key"], [b"the other's"]) == [PutStatus.STORED]
    code, said = fetch(b"key")
    assert (code, "2 pools" in said, "--name" in said) == (2, True, True)
    assert fetch(b"key", "--name", "anoth")[0] == 0
    assert (tmp_path / "out").read_bytes() == b"the other's"


def test_bytes_that_are_not_what_was_stored_are_not_given_and_forgotten(
    start: Callable[..., Daemon], connect: Callable[..., DaemonPool], fetch: Fetch, path: Path, tmp_path: Path
) -> None:
    start()
    pool = connect()
    put(pool, range(3))
    flip(path, 1)
    assert fetch(key_of(1))[0] == 2
    assert not (tmp_path / "out").exists()
    assert get(pool, range(3)) == [GetStatus.DRAM, GetStatus.MISS, GetStatus.DRAM]


def test_an_object_that_another_takes_the_place_of_is_not_put_together(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FetchedPart(1, 6, b"sum", b"abc")
    for changes in ({"checksum": b"another"}, {"nbytes": 7}, {"data": b""}):
        second = msgspec.structs.replace(first, **changes)
        answers = iter([first, second])
        monkeypatch.setattr(links, "_ask", lambda *arguments, answers=answers: next(answers))
        assert fetch_object(path, "", b"key", 0.0) == (0, b"")
