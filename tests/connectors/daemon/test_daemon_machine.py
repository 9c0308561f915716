"""Several clients of one daemon in any order, against a plain dict: no wrong byte, nothing held for ever.

One of them is an engine, which takes its pages before it knows the keys, and reads for a while what it borrowed.
Somebody follows what the pool holds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.engine import Engine, soon
from tests.connectors.daemon.kit import IDENTITY, SIZE, client_of, key_of
from tests.connectors.daemon.told import Told, truth
from tests.connectors.waiting import until
from umbp_connectors.daemon import messages
from umbp_connectors.daemon.follower import PoolFollower
from umbp_connectors.daemon.messages import Place
from umbp_connectors.pool.capacity import catalogue_allowance
from umbp_connectors.pool.outcomes import PutStatus
from umbp_connectors.pool.staged import StagedPut
from umbp_core.tiers import Tier

CLIENTS = 3
PAGES = 12
NUMBERS = st.lists(st.integers(0, 19), min_size=1, max_size=6, unique=True)
MANY = 32
WHO = st.integers(0, CLIENTS - 1)
SLOTS = 8
"""Of the small SSD: fewer than there are keys, and than pages."""
SMALL = SLOTS * SIZE + catalogue_allowance(SLOTS, 1)


class DaemonMachine(RuleBasedStateMachine):
    """Every put has bytes of its own; what is read must be those of the put that was stored last."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "daemon.sock"
        self._ssd = Path(self._folder.name) / "ssd"
        self._turn = 0
        self._there: dict[int, bytes] = {}
        self._staged: list[tuple[int, StagedPut, dict[int, bytes]]] = []
        self._uncertain: set[int] = set()
        """Staged by a client that left: free again as soon as the daemon has noticed."""
        self._stock: set[int] = set()
        """Pages of the engine, without keys."""
        self._old: set[int] = set()
        """Those of them that were taken before a clear."""
        self._lent: list[tuple[int, dict[int, tuple[Place, bytes]]]] = []
        """Loans of the engine: where each object lies, and its bytes."""

    @initialize(ssd=st.sampled_from([0, SMALL, 4 << 20]))
    def start(self, ssd: int) -> None:
        more = {"ssd_dir": self._ssd, "ssd_capacity": ssd} if ssd else {}
        self._daemon = Daemon(self._path, **more)
        self._clients = [self._client() for _ in range(CLIENTS)]
        self._engine = Engine(self._path, pages=PAGES)
        self._engine.open()
        self._told = Told()
        self._follower = PoolFollower(self._path, IDENTITY.digest, self._told)
        self._follower.open()

    def _client(self) -> object:
        pool = client_of(self._path, pages=PAGES)
        pool.open()
        return pool

    def _bytes(self, number: int) -> bytes:
        self._turn += 1
        return (b"%06d %06d " % (number, self._turn) * SIZE)[: SIZE - self._turn % 3]

    @rule(who=WHO, numbers=NUMBERS)
    def put(self, who: int, numbers: list[int]) -> None:
        data = {number: self._bytes(number) for number in numbers}
        statuses = self._clients[who].put([key_of(number) for number in numbers], list(data.values()), numbers)
        for number, status in zip(numbers, statuses, strict=True):
            if status is PutStatus.STORED:
                self._there[number] = data[number]
            else:
                assert status in (PutStatus.PRESENT, PutStatus.NO_ROOM)
                assert status is PutStatus.NO_ROOM or number in self._there or self._is_staged(number)

    @rule(who=WHO)
    def put_more_than_there_is_room_for(self, who: int) -> None:
        self.put(who, list(reversed(range(MANY))))

    @precondition(lambda self: len(self._staged) < 3)
    @rule(who=WHO, numbers=NUMBERS)
    def stage(self, who: int, numbers: list[int]) -> None:
        data = {number: self._bytes(number) for number in numbers}
        staged = self._clients[who].stage([key_of(number) for number in numbers], list(data.values()), numbers)
        mine = {n: data[n] for n, status in zip(numbers, staged.statuses, strict=True) if status is PutStatus.STORED}
        self._staged.append((who, staged, mine))

    @precondition(lambda self: self._staged)
    @rule(data=st.data(), publish=st.booleans())
    def settle(self, data: st.DataObject, publish: bool) -> None:
        which = data.draw(st.integers(0, len(self._staged) - 1))
        _, staged, mine = self._staged.pop(which)
        if not publish:
            staged.discard()
            self._uncertain |= set(mine)
        elif staged.publish():
            self._there.update(mine)

    @rule(who=WHO, numbers=NUMBERS)
    def get(self, who: int, numbers: list[int]) -> None:
        buffers = [bytearray(len(self._there.get(number, b"none"))) for number in numbers]
        statuses = self._clients[who].get([key_of(number) for number in numbers], buffers)
        for number, buffer, status in zip(numbers, buffers, statuses, strict=True):
            if status.hit:
                assert buffer == self._there[number]

    @rule(who=WHO, numbers=NUMBERS)
    def look_up(self, who: int, numbers: list[int]) -> None:
        keys = [key_of(number) for number in numbers]
        there = self._clients[who].exists(keys)
        assert all(number in self._there for number, found in zip(numbers, there, strict=True) if found)
        assert self._clients[who].count_prefix(keys) == [*there, False].index(False)

    @rule(count=st.integers(0, 3))
    def take_pages(self, count: int) -> None:
        pages = self._engine.take(count)
        assert len(set(pages)) == len(pages) <= count
        assert not self._stock & set(pages)
        self._stock |= set(pages)

    @rule(numbers=NUMBERS)
    def publish_pages(self, numbers: list[int]) -> None:
        pages = dict(zip(sorted(self._stock), numbers, strict=False))
        data = {number: self._bytes(number) for number in pages.values()}
        for (page, number), status in zip(pages.items(), self._engine.store(list(pages), data), strict=True):
            assert (status is PutStatus.NO_ROOM) == (page in self._old)
            self._old.discard(page)
            if status is PutStatus.STORED:
                self._there[number] = data[number]
                self._stock.remove(page)
            elif status is PutStatus.PRESENT:
                assert number in self._there or self._is_staged(number)

    @rule(count=st.integers(0, 4))
    def return_pages(self, count: int) -> None:
        going = set(sorted(self._stock)[:count])
        self._engine.leader.return_pages(going, soon())
        self._stock -= going
        self._old -= going

    @rule(numbers=NUMBERS)
    def borrow(self, numbers: list[int]) -> None:
        for number, found in self._engine.fetch(numbers).items():
            assert found == self._there[number]

    @precondition(lambda self: self._there and len(self._lent) < 3)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.sampled_from(sorted(self._there)), min_size=1, max_size=6, unique=True))
        loan, places = self._engine.leader.borrow([key_of(number) for number in numbers], soon())
        found = {n: place for n, place in zip(numbers, places, strict=False) if messages.LENT[place.status].hit}
        self._lent.append((loan, {number: (place, self._there[number]) for number, place in found.items()}))
        self._look_at_loans()

    @precondition(lambda self: self._lent)
    @rule(data=st.data(), who=WHO, crowded=st.booleans())
    def let_go(self, data: st.DataObject, who: int, crowded: bool) -> None:
        if crowded:
            self.put_more_than_there_is_room_for(who)
        self._look_at_loans()
        loan, _ = self._lent.pop(data.draw(st.integers(0, len(self._lent) - 1)))
        self._engine.leader.give_back(loan, soon())

    def _look_at_loans(self) -> None:
        """What is lent stays as it was, whatever became of the object meanwhile."""
        for _, objects in self._lent:
            for number, (place, expected) in objects.items():
                assert self._engine.read(number, place) == expected

    @rule()
    def what_is_there_is_told(self) -> None:
        until(lambda: self._told.held == truth(self._daemon))

    @rule()
    def come_back(self) -> None:
        self._engine.leader.close()
        arena = self._engine.leader.connect(soon())
        assert (arena.known, set(arena.taken)) == (True, self._stock)

    @rule()
    def start_again(self) -> None:
        self._look_at_loans()
        self._lent.clear()
        self._engine.close()
        self._turn += 1
        self._engine = Engine(self._path, name=f"engine {self._turn}", pages=PAGES)
        assert not self._engine.open().known
        self._stock.clear()
        self._old.clear()

    @rule(who=WHO)
    def clear(self, who: int) -> None:
        self._clients[who].clear()
        self._there.clear()
        self._old = set(self._stock)
        for _, staged, _ in self._staged:
            assert not staged.publish() or not staged.statuses.count(PutStatus.STORED)
        self._staged.clear()

    @rule(who=WHO)
    def leave_and_come_back(self, who: int) -> None:
        self._clients[who].close()
        gone = [each for each in self._staged if each[0] == who]
        self._staged = [each for each in self._staged if each[0] != who]
        for _, staged, mine in gone:
            assert not staged.publish()
            self._uncertain |= set(mine)
        self._clients[who] = self._client()

    @invariant()
    def nothing_takes_more_than_there_is(self) -> None:
        for kept in self._daemon.keeper.pools():
            fill = kept.pool.stats(Tier.DRAM)
            assert fill is not None
            assert fill.objects <= PAGES
            below = kept.pool.stats(Tier.SSD)
            assert below is None or below.total_pages == SLOTS or below.total_pages > 20

    def _is_staged(self, number: int) -> bool:
        return number in self._uncertain or any(number in mine for _, _, mine in self._staged)

    def teardown(self) -> None:
        for _, staged, _ in self._staged:
            staged.discard()
        self._look_at_loans()
        for loan, _ in self._lent:
            self._engine.leader.give_back(loan, soon())
        until(lambda: self._daemon.pinned() == len(self._stock))
        self._engine.close()
        until(lambda: self._daemon.pinned() == 0)
        self.what_is_there_is_told()
        for client in self._clients:
            client.close()
        until(lambda: self._daemon.server.connections == 1)
        self._daemon.close()
        self._follower.close()
        self._folder.cleanup()


TestDaemonMachine = DaemonMachine.TestCase
TestDaemonMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
