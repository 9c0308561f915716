"""``umbp pool evict`` and ``clear`` beside a daemon that uses the folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.commands import umbp
from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import IDENTITY, SIZE, get, key_of, put
from tests.connectors.disk import Disk, FullDisk
from tests.connectors.talking import talk
from tests.connectors.waiting import until
from umbp_connectors.daemon import messages
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.link import manage
from umbp_connectors.daemon.managing import KEYS, Evict, Manage
from umbp_connectors.pool.local import LocalPool, LocalPoolConfig
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_connectors.pool.slab import SlabFile
from umbp_core.errors import TierUnavailable
from umbp_core.ids import Identity
from umbp_core.wire.frames import FrameType, encode_frame

Run = Callable[..., tuple[int, Any]]
ALL = range(8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ssd"


@pytest.fixture
def run(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `umbp pool` on the folder; its exit code, and what it says, as a value when it was asked for JSON."""

    def run(command: str, *arguments: str, socket: Path = path) -> tuple[int, Any]:
        asks = ["--socket", str(socket)] if command in ("evict", "clear") else []
        return umbp(monkeypatch, capsys, "pool", command, *arguments, "--dir", str(folder), *asks)

    return run


@pytest.fixture
def pool(start: Callable[..., Daemon], connect: Callable[..., DaemonPool], folder: Path) -> DaemonPool:
    """A client of a daemon with eight objects in memory and on SSD."""
    start(ssd_dir=folder, ssd_capacity="8MiB")
    pool = connect()
    assert put(pool, ALL) == [PutStatus.STORED] * 8
    assert pool.flush(30)
    return pool


def soon() -> float:
    return time.monotonic() + 30


def listed(run: Run) -> set[str]:
    return {row["key"] for row in run("ls", "--json")[1]}


def test_evicted_objects_are_gone_from_memory_ssd_and_catalogue(run: Run, pool: DaemonPool) -> None:
    keys = [key_of(number).hex() for number in (2, 5)]
    assert "2 objects would go" in run("evict", *keys)[1]
    assert pool.exists([key_of(2)]) == [True]
    code, said = run("evict", *keys, "--yes")
    assert (code, "2 objects are gone" in said) == (0, True)
    assert listed(run) == {key_of(number).hex() for number in (0, 1, 3, 4, 6, 7)}
    hits = [status.hit for status in get(pool, ALL)]
    assert hits == [number not in (2, 5) for number in ALL]
    assert put(pool, [2]) == [PutStatus.STORED]
    assert get(pool, [2]) == [GetStatus.DRAM]
    assert pool.flush(30)
    assert "7 objects are gone" in run("evict", "--prefix", key_of(0)[:20].hex(), "--yes")[1]
    assert pool.exists([key_of(number) for number in ALL]) == [False] * 8


def test_clear_keeps_the_files_of_a_daemon(run: Run, pool: DaemonPool, folder: Path) -> None:
    assert "8 objects would go" in run("clear")[1]
    code, said = run("clear", "--yes")
    assert code == 0
    assert "all objects are gone" in said
    assert pool.exists([key_of(number) for number in ALL]) == [False] * 8
    assert listed(run) == set()
    assert list(folder.rglob("slab-*.bin"))
    assert put(pool, ALL) == [PutStatus.STORED] * 8
    assert pool.flush(30)
    assert len(listed(run)) == 8


def test_a_daemon_whose_ssd_is_off_forgets_nothing_for_an_engine_that_has_it(
    run: Run,
    start: Callable[..., Daemon],
    connect: Callable[..., DaemonPool],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(slab: SlabFile) -> None:
        raise TierUnavailable("no room")

    start(ssd_dir=folder, ssd_capacity="8MiB")
    with monkeypatch.context() as patch:
        patch.setattr(SlabFile, "open", refuse)
        pool = connect()
    assert put(pool, ALL) == [PutStatus.STORED] * 8
    config = LocalPoolConfig(SIZE, 8 * SIZE, folder, 8 << 20, prefault=False, rank=0)
    with contextlib.closing(LocalPool(IDENTITY, config)) as engine:
        engine.open()
        assert engine.put([b"key"], [bytes(SIZE)]) == [PutStatus.STORED]
        assert engine.flush(30)
        for command in (["evict", b"key".hex(), "--yes"], ["clear", "--yes"]):
            code, said = run(*command)
            assert (code, "is in use, and not by a daemon that answers" in said) == (2, True)
        assert engine.exists([b"key"]) == [True]
    assert pool.exists([key_of(0)]) == [True]


def test_what_an_engine_uses_by_itself_is_left_alone(
    run: Run, pool: DaemonPool, folder: Path, path: Path, tmp_path: Path
) -> None:
    other = Identity("of an engine", IDENTITY.layout, IDENTITY.rank)
    config = LocalPoolConfig(SIZE, 8 * SIZE, folder, 12 << 20, prefault=False)
    with contextlib.closing(LocalPool(other, config)) as engine:
        engine.open()
        assert engine.put([b"key"], [bytes(SIZE)]) == [PutStatus.STORED]
        assert engine.flush(30)
        for command in (["evict", b"key".hex(), "--yes"], ["clear", "--name", "of an engine", "--yes"]):
            code, said = run(*command)
            assert code == 2
            assert "is in use, and not by a daemon that answers" in said
        assert engine.exists([b"key"]) == [True]
    code, said = run("evict", key_of(0).hex(), "--yes", socket=tmp_path / "nowhere.sock")
    assert (code, "is in use" in said) == (2, True)
    assert pool.exists([key_of(0)]) == [True]


def test_a_disk_that_takes_no_note_of_it_is_said(run: Run, pool: DaemonPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Disk(patch).fail("sync")
        code, said = run("evict", key_of(3).hex(), "--yes")
    assert code
    assert "its disk has not taken note of it yet" in said
    assert pool.exists([key_of(3)]) == [False]


def test_a_client_that_clears_is_told_and_the_log_when_the_disk_does_not_take_it(
    pool: DaemonPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        FullDisk(patch).full = True
        with pytest.raises(TierUnavailable, match="did not say that it forgot"):
            pool.clear()
    assert "a client ordered a clear that failed" in caplog.text
    until(lambda: put(pool, [9]) == [PutStatus.STORED])
    assert pool.clear() > 0
    assert get(pool, [*ALL, 9]) == [GetStatus.MISS] * 9


def test_another_folder_or_pool_is_refused(pool: DaemonPool, folder: Path, path: Path, tmp_path: Path) -> None:
    with pytest.raises(TierUnavailable, match="no such pool"):
        manage(path, IDENTITY.digest, tmp_path, soon())
    with pytest.raises(TierUnavailable, match="no such pool"):
        manage(path, bytes(32), folder, soon())
    with contextlib.closing(manage(path, IDENTITY.digest, folder, soon())) as link:
        many = [b"%d" % number for number in range(KEYS + 5)]
        assert link.evict([*many, key_of(1)], soon()) == 1
        assert link.flush(25, soon())
        assert link.clear(soon()) == 14


def test_what_is_no_order_ends_the_connection_only(pool: DaemonPool, folder: Path, path: Path) -> None:
    greeting = Manage(messages.REVISION, IDENTITY.digest, str(folder.resolve()))
    hello = encode_frame(FrameType.HELLO, 0, 0, messages.encode(greeting))
    good = talk(path, hello)
    assert good
    for kind, payload in (
        (FrameType.REQUEST, b"\xc1"),
        (FrameType.REQUEST, messages.encode(Evict([b"k"] * (KEYS + 1)))),
        (FrameType.REQUEST, messages.encode(Evict([b""]))),
        (FrameType.REQUEST, messages.encode(greeting)),
        (FrameType.HELLO, messages.encode(Evict([key_of(0)]))),
    ):
        assert talk(path, hello, encode_frame(kind, 0, 1, payload)) == good
    assert pool.exists([key_of(0)]) == [True]
