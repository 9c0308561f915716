"""Pages of the daemon for engines whose ranks copy by themselves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.engine import Engine, identities_of, soon, wanted
from tests.connectors.daemon.kit import PAGES, SIZE, get, key_of, object_of, put
from tests.connectors.waiting import until
from umbp_connectors.daemon import messages
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.pages import NewObject, PageClient, RankArena, WantedPages, engine_token
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.errors import ConfigError, StateError, TierUnavailable, UmbpError
from umbp_core.wire.codes import WireError

Start = Callable[..., Daemon]
Connect = Callable[..., DaemonPool]
Run = Callable[..., Engine]


@pytest.fixture
def run(path: Path, closing: contextlib.ExitStack) -> Run:
    """Starts an engine."""

    def run(ranks: int = 1, name: str = "engine", **options: int) -> Engine:
        engine = Engine(path, ranks, name, **options)
        closing.callback(engine.close)
        engine.open()
        return engine

    return run


def _objects(*numbers: int, ranks: int = 1, size: int = SIZE) -> dict[int, bytes]:
    return {number: object_of(number, size * ranks) for number in numbers}


@pytest.mark.parametrize("ranks", [1, 3])
def test_pages_are_taken_before_their_keys_are_known(start: Start, run: Run, ranks: int) -> None:
    daemon, engine = start(), run(ranks)
    arena = engine.arena
    assert (arena.page_bytes, arena.stripes, arena.known, arena.taken) == (SIZE, ranks, False, ())
    assert {rank.name for rank in engine.ranks} == {arena.name}
    pages = engine.take(6)
    assert len(set(pages)) == 6
    assert daemon.pinned() == 6
    assert engine.leader.look_up([key_of(1)], False, soon()) == engine.leader.look_up([key_of(9)], False, soon())
    objects = _objects(1, 2, 3, ranks=ranks, size=SIZE - 7)
    assert engine.store(pages[:3], objects) == [PutStatus.STORED] * 3
    assert engine.fetch([1, 2, 3, 4]) == objects
    found = engine.leader.look_up([key_of(number) for number in range(1, 6)], False, soon())
    assert (found.prefix, found.there) == (3, b"\x01\x01\x01\x00\x00")
    engine.leader.return_pages(pages[3:], soon())
    until(lambda: daemon.pinned() == 0)
    assert engine.leader.clear(soon()) == 3
    assert engine.fetch([1, 2]) == {}


def test_a_single_stripe_is_what_other_clients_store_and_find(start: Start, run: Run, connect: Connect) -> None:
    start()
    engine, pool = run(), connect()
    assert engine.store(engine.take(1), _objects(1)) == [PutStatus.STORED]
    assert put(pool, [1, 2]) == [PutStatus.PRESENT, PutStatus.STORED]
    assert get(pool, [1, 2]) == [GetStatus.DRAM] * 2
    assert engine.fetch([1, 2]) == _objects(1, 2)
    with pool.stage([key_of(3)], [object_of(3)]):
        (page,) = engine.take(1)
        assert engine.store([page], _objects(3)) == [PutStatus.PRESENT], "somebody writes it already"
        assert engine.store([page], _objects(4)) == [PutStatus.STORED], "the page stayed the engine's"
    assert len(engine.ranks[0].pages) == PAGES


def test_rows_of_a_stripe_lie_where_the_arena_says(start: Start, run: Run) -> None:
    start()
    engine = run(3)
    (page,) = engine.take(1)
    for stripe, rank in enumerate(engine.ranks):
        rank.pages[page] = stripe + 1
    assert all(rank.wait_present(30) for rank in engine.ranks)
    flat = engine.ranks[0].whole.reshape(-1)
    for stripe in range(3):
        first = (page * 3 + stripe) * SIZE
        assert np.all(flat[first : first + SIZE] == stripe + 1)


def test_two_engines_race_to_publish_one_key(start: Start, run: Run) -> None:
    daemon = start()
    one, two = run(2, "one"), run(2, "two")
    first, second = one.take(2), two.take(2)
    assert not set(first) & set(second)
    mine = one.write(first[0], 5, object_of(5, 2 * SIZE))
    theirs = two.write(second[0], 5, object_of(6, 2 * SIZE))
    assert two.leader.publish([theirs], soon()) == [PutStatus.STORED]
    assert one.leader.publish([mine, one.write(first[1], 7, object_of(7, 2 * SIZE))], soon()) == [
        PutStatus.PRESENT,
        PutStatus.STORED,
    ]
    assert one.fetch([5, 7]) == {5: object_of(6, 2 * SIZE), 7: object_of(7, 2 * SIZE)}
    one.leader.return_pages(first[:1], soon())
    until(lambda: daemon.pinned() == 1)


def test_engines_race_for_many_keys_at_once(start: Start, run: Run) -> None:
    """Every key is stored by exactly one of them, and what is read is that one's."""
    daemon = start()
    engines = [run(2, f"engine {number}") for number in range(4)]
    barrier = threading.Barrier(len(engines))

    def race(engine: Engine) -> dict[int, bytes]:
        mine: dict[int, bytes] = {}
        pages: list[int] = []
        for number in range(PAGES // 2):
            pages += engine.take(1) if not pages else []
            data = object_of(1000 * engines.index(engine) + number, 2 * SIZE)
            new = engine.write(pages[0], number, data)
            barrier.wait(60)
            (status,) = engine.leader.publish([new], soon())
            if status is PutStatus.STORED:
                mine[number] = data
                pages.clear()
            else:
                assert status is PutStatus.PRESENT
        return mine

    with ThreadPoolExecutor(len(engines)) as threads:
        stored = list(threads.map(race, engines))
    assert sorted(number for mine in stored for number in mine) == list(range(PAGES // 2))
    whole = {number: data for mine in stored for number, data in mine.items()}
    for number, data in whole.items():
        assert engines[number % 4].fetch([number]) == {number: data}
    for engine in engines:
        engine.close()
    until(lambda: daemon.pinned() == 0)


def test_only_what_is_ones_own_is_published_or_returned(start: Start, run: Run) -> None:
    daemon = start()
    one, two = run(1, "one"), run(1, "two")
    (page,), (other,) = one.take(1), two.take(1)
    for wrong in (
        lambda: one.leader.return_pages([other], soon()),
        lambda: one.leader.publish([one.write(other, 1, object_of(1))], soon()),
        lambda: one.leader.publish([one.write(page, number, object_of(1)) for number in (1, 2)], soon()),
    ):
        with pytest.raises(StateError, match="not ours"):
            wrong()
        with pytest.raises(StateError, match="connect"):
            one.take(1)
        arena = one.leader.connect(soon())
        assert (arena.known, arena.taken) == (True, (page,))
    assert daemon.pinned() == 2
    for link, number in ((one.leader.connected(), other), (two.leader.connected(), PAGES + 7)):
        with pytest.raises((OSError, WireError)):
            link.publish_pages([NewObject(number, b"k", 8, 0, bytes(16))], soon(5))
    assert one.leader.connect(soon()).taken == (page,)
    assert one.store([page], _objects(1)) == [PutStatus.STORED]


def test_sizes_and_checksums(start: Start, run: Run) -> None:
    start()
    engine = run(2)
    (page,) = engine.take(1)
    new = engine.write(page, 1, object_of(1, 2 * SIZE))
    for nbytes in (0, SIZE + 1, 1 << 50):
        assert engine.leader.publish([msgspec.structs.replace(new, nbytes=nbytes)], soon()) == [PutStatus.TOO_LARGE]
    with pytest.raises((OSError, WireError)):
        engine.leader.publish([msgspec.structs.replace(new, checksums=bytes(16))], soon())
    assert engine.leader.connect(soon()).taken == (page,)
    assert engine.leader.publish([new], soon()) == [PutStatus.STORED]


def test_an_engine_may_hold_its_part_of_half_of_the_arena(start: Start, run: Run) -> None:
    daemon = start()
    one = run(1, "one")
    pages = [page for _ in range(PAGES) for page in one.take(8)]
    assert len(set(pages)) == len(pages) == PAGES // 2 == daemon.pinned()
    assert one.leader.borrow([key_of(1)], soon())[1] == [], "its stock counts"
    one.leader.return_pages(pages[:20], soon())
    two = run(1, "two")
    assert len(two.take(PAGES)) == PAGES // 4
    assert len(one.take(PAGES)) == PAGES // 4 - (PAGES // 2 - 20)
    assert one.store(pages[20:24], _objects(1, 2, 3, 4)) == [PutStatus.STORED] * 4
    assert len(one.take(PAGES)) == 4
    assert two.leader.borrow([key_of(1)], soon())[1] == []
    two.close()
    one.close()
    until(lambda: daemon.pinned() == daemon.server.connections == 0)
    one.open()
    assert len(one.take(PAGES)) == PAGES // 2, "nothing of its former life counts"


def test_engines_that_come_one_after_the_other_leave_room_for_others(start: Start, run: Run, connect: Connect) -> None:
    daemon = start()
    engines = []
    for number in range(4):
        engines.append(run(1, str(number)))
        while engines[-1].take(8):
            pass
    assert daemon.pinned() == PAGES // 2 + 3, "those who came late have one page each beyond half of the arena"
    pool = connect()
    assert [put(pool, [number]) for number in range(8)] == [[PutStatus.STORED]] * 8
    assert [get(pool, [number]) for number in range(8)] == [[GetStatus.DRAM]] * 8
    engines[0].close()
    (kept,) = daemon.keeper.pools()
    until(lambda: len(kept.clients) == 4)
    until(lambda: daemon.pinned() == 3)  # a get does not wait until the daemon has taken back what it lent
    assert len(engines[1].take(PAGES)) == PAGES // 8 - 1, "there are four clients now"


def test_a_clear_refuses_once_what_was_taken_before(start: Start, run: Run) -> None:
    start()
    engine, other = run(1, "one"), run(1, "two")
    pages = engine.take(2)
    new = engine.write(pages[0], 1, object_of(1))
    assert other.leader.clear(soon()) == 0
    assert engine.leader.publish([new], soon()) == [PutStatus.NO_ROOM], "it is older than the clear"
    assert engine.store(pages, _objects(1, 2)) == [PutStatus.STORED, PutStatus.NO_ROOM]
    assert engine.store(pages[1:], _objects(2)) == [PutStatus.STORED]
    assert engine.fetch([1, 2]) == _objects(1, 2)


def test_what_was_lent_stays_until_it_is_given_back(start: Start, run: Run) -> None:
    daemon, engine = start(), run()
    engine.store(engine.take(4), _objects(0, 1, 2, 3))
    loan, places = engine.leader.borrow([key_of(number) for number in range(4)], soon())
    assert daemon.pinned() == 4
    for turn in range(PAGES // 4):  # more than there is room for
        pages = engine.take(4)
        engine.store(pages, _objects(*range(100 + 4 * turn, 104 + 4 * turn)))
    assert [engine.read(number, place) for number, place in enumerate(places)] == list(_objects(0, 1, 2, 3).values())
    engine.leader.give_back(loan, soon())
    engine.leader.give_back(loan, soon())
    until(lambda: daemon.pinned() == 0)


def test_many_keys_are_looked_up_in_parts(start: Start, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    engine = run()
    engine.store(engine.take(8), _objects(0, 1, 2, 3, 4, 5, 8, 9))
    monkeypatch.setattr(messages, "KEYS", 4)
    keys = [key_of(number) for number in range(11)]
    found = engine.leader.look_up(keys, False, soon())
    assert (found.prefix, found.there) == (6, bytes([1] * 6 + [0] * 2 + [1] * 2 + [0]))
    for first, prefix in ((0, 6), (2, 4), (4, 2), (6, 0), (8, 2)):
        assert engine.leader.look_up(keys[first:], True, soon()).prefix == prefix


@pytest.mark.parametrize("ranks", [1, 2])
def test_bytes_that_changed_are_found_by_the_daemon_too(start: Start, run: Run, ranks: int) -> None:
    start()
    engine = run(ranks)
    pages = engine.take(2)
    engine.store(pages, _objects(1, 2, ranks=ranks))
    engine.ranks[-1].pages[pages[0], 5] ^= 1
    engine.leader.doubt([key_of(1), key_of(2)], soon())
    assert engine.fetch([1, 2]) == _objects(2, ranks=ranks)


def test_other_ranks_other_sizes_and_no_daemon(start: Start, run: Run, path: Path, connect: Connect) -> None:
    lonely = PageClient(wanted(path))
    with pytest.raises(OSError, match=r".*"):
        lonely.connect(soon())
    with pytest.raises(StateError, match="connect"):
        lonely.take_pages(1, soon())
    start()
    run(2)
    with pytest.raises(TierUnavailable, match="same layout"):
        run(2, size=2 * SIZE)
    for identities, stripe in (((), 0), (identities_of(2), 2), (identities_of(2), -1)):
        arena = RankArena(WantedPages(path, identities, SIZE, PAGES * SIZE, engine_token("e")), stripe)
        with pytest.raises(ConfigError):
            arena.open(soon())
        with pytest.raises(StateError, match="not open"):
            assert arena.pages.size
    group = wanted(path, 2).identity
    pool = connect(group)
    assert pool.put([key_of(1)], [object_of(1)]) == [PutStatus.NO_ROOM], "these objects have two parts"


def test_the_deadline_ends_a_call(start: Start, run: Run) -> None:
    start()
    engine = run()
    pages = engine.take(2)
    with pytest.raises(TimeoutError):
        engine.leader.take_pages(1, soon(-1))
    with pytest.raises(UmbpError):
        engine.leader.take_pages(1, soon())
    assert engine.leader.connect(soon()).taken == tuple(pages)
