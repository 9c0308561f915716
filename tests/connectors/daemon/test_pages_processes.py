"""Engines over the daemon of which a process dies, hangs or comes back; and a daemon that does."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.engine import Engine, soon, wanted
from tests.connectors.daemon.kit import PAGES, SIZE, key_of, object_of
from tests.connectors.daemon.processes import DRAINING, PROGRAM, Process, Stopped, client, daemon, environment
from tests.connectors.waiting import until
from umbp_connectors.daemon.pages import PageClient, RankArena
from umbp_connectors.pool.inspection import find_catalogues
from umbp_connectors.pool.maintenance import load, verify
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.errors import VerificationError

Start = Callable[..., Daemon]


@pytest.fixture
def run(closing: contextlib.ExitStack, path: Path) -> Callable[[str], Process]:
    """Starts a process of an engine."""

    def run(role: str) -> Process:
        process = client(role, path)
        closing.callback(process.kill)
        return process

    return run


@pytest.fixture
def engine(closing: contextlib.ExitStack, path: Path) -> Callable[..., Engine]:
    """An engine in this process, not open yet."""

    def engine(ranks: int = 2, name: str = "engine", **options: int) -> Engine:
        made = Engine(path, ranks, name, **options)
        closing.callback(made.close)
        return made

    return engine


def _objects(*numbers: int) -> dict[int, bytes]:
    return {number: object_of(number, 2 * SIZE) for number in numbers}


def test_a_leader_is_killed_and_a_rank_may_still_copy(
    start: Start, run: Callable[[str], Process], engine: Callable[..., Engine]
) -> None:
    daemon = start()
    rank, leader = run("rank"), run("leader")
    assert daemon.pinned() == 5, "four pages without keys, and an object that is lent"
    leader.kill()
    until(lambda: daemon.server.connections == 1)
    other = engine(name="another")
    other.open()
    assert daemon.pinned() == 5
    for turn in range(2 * PAGES // 8):  # whoever wants all of the pool
        pages = other.take(8)
        assert other.store(pages, _objects(*range(100 + 8 * turn, 108 + 8 * turn))) == [PutStatus.STORED] * 8
    assert daemon.pinned() == 5, "nobody got a page that the rank may write to or read"
    assert other.fetch([0]) == _objects(0), "it was lent and could not go"
    assert other.fetch([1]) == {}
    rank.kill()
    until(lambda: daemon.pinned() == 0)


def test_a_rank_that_dies_takes_nothing_with_it(start: Start, run: Callable[[str], Process]) -> None:
    daemon = start()
    leader, rank = run("leader"), run("rank")
    rank.kill()
    until(lambda: daemon.server.connections == 3)
    assert daemon.pinned() == 5
    leader.kill()
    until(lambda: daemon.pinned() == 0)


def test_an_engine_that_starts_again_beside_a_process_of_its_former_life(
    start: Start, run: Callable[[str], Process], engine: Callable[..., Engine]
) -> None:
    daemon = start()
    orphan, leader = run("rank"), run("leader")
    leader.kill()
    until(lambda: daemon.server.connections == 1)
    again = engine()  # with the same token, though engines should not have that
    assert not again.open().known
    pages = again.take(4)
    assert daemon.pinned() == 9
    assert again.store(pages[:2], _objects(0, 5)) == [PutStatus.PRESENT, PutStatus.STORED]
    orphan.kill()
    until(lambda: daemon.pinned() == 3)
    assert again.store(pages[2:], _objects(6, 7)) == [PutStatus.STORED] * 2


def test_the_lease_of_a_dead_leader_ends_when_others_need_the_memory(
    start: Start, run: Callable[[str], Process], engine: Callable[..., Engine]
) -> None:
    daemon = start(lease_s=0.3)
    run("rank")
    run("leader").kill()
    until(lambda: daemon.server.connections == 1)
    other = engine(name="another")
    other.open()
    until(lambda: other.take(0) == [] and daemon.pinned() < 5)
    assert daemon.pinned() == 4, "pages that the rank may write to stay"


def test_a_leader_comes_back_to_what_it_had(start: Start, path: Path, engine: Callable[..., Engine]) -> None:
    daemon = start()
    mine = engine()
    mine.open()
    pages = mine.take(5)
    mine.store(pages[:1], _objects(1))
    loan, _ = mine.leader.borrow([key_of(1)], soon())
    mine.leader.close()
    until(lambda: daemon.server.connections == 2)
    assert daemon.pinned() == 5
    arena = mine.leader.connect(soon())
    assert (arena.known, set(arena.taken)) == (True, set(pages[1:]))
    mine.leader.give_back(loan, soon())
    until(lambda: daemon.pinned() == 4)
    assert mine.store(pages[1:2], _objects(2)) == [PutStatus.STORED]
    mine.close()
    until(lambda: daemon.pinned() == 0)
    arena = mine.open()
    assert (arena.known, arena.taken) == (False, ()), "all its connections had ended"
    assert mine.fetch([1, 2]) == _objects(1, 2)


def test_what_an_answer_that_was_lost_did_is_found_out(start: Start, engine: Callable[..., Engine]) -> None:
    daemon = start()
    mine = engine()
    mine.open()
    pages = mine.take(3)
    objects = [mine.write(page, number, object_of(number, 2 * SIZE)) for number, page in enumerate(pages)]
    link = mine.leader.connected()
    link.publish_pages(objects[:1], soon())  # as if nobody had heard the answers
    link.take_pages(4, soon())
    mine.leader.close()
    assert set(mine.leader.connect(soon()).taken) == set(pages[1:])
    until(lambda: daemon.pinned() == 2)
    assert mine.leader.publish(objects[1:], soon()) == [PutStatus.STORED] * 2
    assert len(mine.take(PAGES)) == PAGES // 2


def _daemon(path: Path, folder: Path, closing: contextlib.ExitStack, *more: str, program: str = PROGRAM) -> Process:
    sizes = "--dram-capacity", "8MiB", "--ssd-dir", str(folder), "--ssd-capacity", "64MiB"
    process = daemon(path, *sizes, *more, program=program)
    closing.callback(process.kill)
    return process


def test_a_daemon_is_killed_and_its_ssd_serves_the_next(
    path: Path, tmp_path: Path, closing: contextlib.ExitStack, engine: Callable[..., Engine]
) -> None:
    folder = tmp_path / "ssd"
    first = _daemon(path, folder, closing)
    mine = engine()
    name = mine.open().name
    pages = mine.take(8)
    size = 2 * (SIZE - 100)
    objects = {number: object_of(number, size) for number in range(6)}
    assert mine.store(pages[:6], objects) == [PutStatus.STORED] * 6
    assert mine.leader.connected().flush(20, soon())
    first.kill()
    with pytest.raises(OSError, match=r".*"):
        mine.take(1)
    with pytest.raises(OSError, match=r".*"):
        mine.leader.connect(soon(0.5))
    mine.ranks[0].pages[pages[0]] = 1  # what still copies does so into memory that nobody else has
    second = _daemon(path, folder, closing)
    arena = mine.open()
    assert (arena.name != name, arena.known, arena.taken) == (True, False, ())
    assert {rank.name for rank in mine.ranks} == {arena.name}
    assert mine.statuses(range(7)) == [GetStatus.SSD] * 6 + [GetStatus.MISS]
    assert mine.fetch(range(7)) == objects
    assert mine.store(mine.take(1), {2: object_of(3, size)}) == [PutStatus.PRESENT], "it is in DRAM by now"
    mine.close()
    second.terminate()
    _verify(folder, size)


def _verify(folder: Path, size: int) -> None:
    """What tools say about six objects of two parts in ``folder``; then about one that was changed there."""
    (catalogue,) = find_catalogues(folder)
    assert (catalogue.ranks, catalogue.striped, catalogue.in_use) == (2, True, False)
    assert (verify(catalogue).objects, verify(catalogue).problems) == (6, [])
    (stored,) = [each for each in catalogue.objects() if each.key == key_of(4)]
    assert b"".join(load(catalogue, stored, rank) for rank in range(2)) == object_of(4, size)
    (slab,) = folder.glob("*/rank0/slab-*.bin")
    with slab.open("r+b") as file:
        whole = file.read()
        file.seek(whole.index(object_of(4, size)[size // 2 :]) + 9)
        file.write(b"?")
    assert verify(catalogue).bad == [key_of(4)]
    assert load(catalogue, stored, 0) == object_of(4, size)[: size // 2]
    with pytest.raises(VerificationError):
        load(catalogue, stored, 1)


def test_a_daemon_that_is_stopped_does_not_wait_for_pages_in_stock(
    path: Path, tmp_path: Path, closing: contextlib.ExitStack, engine: Callable[..., Engine]
) -> None:
    first = _daemon(path, tmp_path / "ssd", closing, program=DRAINING + PROGRAM)
    mine = engine()
    mine.open()
    mine.store(mine.take(4), _objects(1, 2, 3, 4))
    mine.take(4)
    first.terminate()  # waits for its end, for less time than the daemon has for what is held
    assert first.process.returncode == 0
    with pytest.raises(OSError, match=r".*"):
        mine.take(1)
    _daemon(path, tmp_path / "ssd", closing)
    mine.open()
    assert mine.fetch([1, 2, 3, 4]) == _objects(1, 2, 3, 4)


def test_a_daemon_that_hangs_costs_the_deadline(
    path: Path, tmp_path: Path, closing: contextlib.ExitStack, engine: Callable[..., Engine]
) -> None:
    process = _daemon(path, tmp_path / "ssd", closing)
    mine = engine()
    mine.open()
    pages = mine.take(4)
    began = time.monotonic()
    with Stopped(process):
        with pytest.raises(TimeoutError):
            mine.leader.look_up([key_of(1)], True, soon(0.3))
        with pytest.raises(TimeoutError):
            mine.leader.connect(soon(0.3))
        with pytest.raises(TimeoutError):
            RankArena(wanted(path, 2)).open(soon(0.3))
        assert time.monotonic() - began < 25
    arena = mine.leader.connect(soon())
    assert (arena.known, set(arena.taken)) == (True, set(pages))
    assert mine.store(pages[:1], _objects(1)) == [PutStatus.STORED], "attempts from before do not speak for it"


def test_quotas_and_the_view_of_an_engine(
    path: Path, tmp_path: Path, closing: contextlib.ExitStack, engine: Callable[..., Engine]
) -> None:
    quota = 8 * 2 * SIZE
    _daemon(path, tmp_path / "ssd", closing, "--set", f"daemon_quota={quota}")
    mine = engine()
    assert mine.open().pages == 8
    pages = mine.take(PAGES)
    assert len(pages) == 4
    told = _status(path)
    assert (told["clients"], told["dram_bytes"], told["page_bytes"]) == (["engine"], quota, 2 * SIZE)
    assert told["fills"][0]["reserved"] == 4
    second = PageClient(wanted(path, 2, "second"))
    closing.callback(second.close)
    assert second.connect(soon()).pages == 8, "it shares the pool"
    assert len(second.take_pages(8, soon())) == 1, "the first one has all of their half"
    mine.leader.return_pages(pages[:2], soon())
    until(lambda: second.take_pages(8, soon()))
    assert (len(mine.take(8)), _status(path)["fills"][0]["reserved"]) == (0, 4)


def _status(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, "daemon", "--socket", str(path), "--status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=True)
    (pool,) = json.loads(done.stdout)["pools"]
    return dict(pool)
