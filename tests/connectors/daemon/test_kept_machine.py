"""Clients of one pool that come, take pages, give some back and go, in any order: who may hold how many."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.connectors.daemon.kit import IDENTITY, SIZE
from umbp_connectors.daemon.kept import KeptPool
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.settings import LocalPoolConfig

PAGES = 40


class KeptMachine(RuleBasedStateMachine):
    """Half of the arena is for all clients; what each may have of it depends on how many they are now."""

    def __init__(self) -> None:
        super().__init__()
        config = LocalPoolConfig(SIZE, PAGES * SIZE)
        self._kept = KeptPool(LocalPool(IDENTITY, config), PAGES, SIZE)
        self._numbers: dict[bytes, int] = {}
        self._held: dict[bytes, int] = {}

    @rule(name=st.integers(0, 30))
    def come(self, name: int) -> None:
        client = b"%016d" % name
        if client not in self._numbers:
            self._numbers[client] = self._kept.join(client, "somebody")
            self._held[client] = 0

    @precondition(lambda self: self._numbers)
    @rule(data=st.data(), count=st.integers(1, PAGES))
    def take(self, data: st.DataObject, count: int) -> None:
        client = data.draw(st.sampled_from(sorted(self._numbers)))
        others, mine = sum(self._held.values()), self._held[client]
        taken = self._kept.take(client, count)
        assert 0 <= taken <= count
        part = PAGES // (2 * len(self._numbers))
        assert mine + taken <= max(1, mine, part)
        assert taken >= (mine == 0), "who holds nothing gets on"
        if taken < count and mine + taken < part:
            assert others + taken >= PAGES // 2, "there was more to be had"
        if mine + taken > 1 and taken:
            assert others + taken <= PAGES // 2, "all of it is for all of them"
        self._held[client] += taken

    @precondition(lambda self: self._numbers)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(self._numbers)))
        count = data.draw(st.integers(0, self._held[client]))
        self._kept.put_back(client, count)
        self._held[client] -= count

    @precondition(lambda self: self._numbers)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(self._numbers)))
        self._kept.put_back(client, self._held.pop(client))
        self._kept.leave(self._numbers.pop(client))

    @invariant()
    def others_have_room(self) -> None:
        assert sum(self._held.values()) <= PAGES // 2 + len(self._numbers)


TestKeptMachine = KeptMachine.TestCase
TestKeptMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
