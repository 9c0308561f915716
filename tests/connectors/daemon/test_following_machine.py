"""One who follows a pool, beside a plain model: whatever is late, lost or said twice, he knows the truth in the end."""

from __future__ import annotations

from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.connectors.daemon.told import Held, Told
from umbp_connectors.daemon import messages, watches
from umbp_connectors.daemon.heard import HeardPool
from umbp_connectors.daemon.news import Changed, News
from umbp_connectors.daemon.watches import Watch, news_of
from umbp_core.directory import Change, EventKind
from umbp_core.tiers import Tier

KEYS = st.lists(st.integers(0, 11), min_size=1, max_size=9, unique=True)
TIERS = st.sampled_from([Tier.DRAM, Tier.SSD])


class FollowingMachine(RuleBasedStateMachine):
    """The pool is the model itself; the daemon's part and the listener's are as slow as they like."""

    def __init__(self) -> None:
        super().__init__()
        self._truth: Held = {Tier.DRAM: set(), Tier.SSD: set()}
        self._watch = Watch()
        self._heard = HeardPool()
        self._told = Told()
        self._meanwhile: list[tuple[Tier, list[int]]] = []
        self._parts = mock.patch.object(watches, "KEYS", 3)
        self._parts.start()

    @initialize(there=KEYS)
    def begin(self, there: list[int]) -> None:
        self._turn(Tier.SSD, there)
        self.connect()

    @rule(tier=TIERS, numbers=KEYS)
    def change(self, tier: Tier, numbers: list[int]) -> None:
        """What is there leaves, and what is not comes."""
        self._turn(tier, numbers)

    @rule(tier=TIERS, numbers=KEYS)
    def change_while_it_is_listed(self, tier: Tier, numbers: list[int]) -> None:
        self._meanwhile.append((tier, numbers))

    @rule(tier=TIERS)
    def clear(self, tier: Tier) -> None:
        self._turn(tier, [int(key) for key in self._truth[tier]])

    @rule()
    def connect(self) -> None:
        """Anew; for the listener nothing is there until it hears otherwise."""
        self._tell(self._heard.lose())
        assert self._told.held == {Tier.DRAM: set(), Tier.SSD: set()}
        self._watch = Watch(most=8)
        self._news = news_of(self._watch, self._listed, 0.0)

    @rule()
    def hear(self) -> None:
        self._hear()

    @rule()
    def hear_all(self) -> None:
        while self._hear() != Changed([]):
            pass
        assert self._told.held == self._truth

    def _hear(self) -> News:
        """The next message, over the wire."""
        news = messages.decode_news(memoryview(messages.encode(next(self._news))))
        self._tell(self._heard.take(news))
        return news

    def _tell(self, changes: list[Change]) -> None:
        self._told.changed(changes, self._heard.holdings)

    def _turn(self, tier: Tier, numbers: list[int]) -> None:
        keys = {b"%d" % number for number in numbers}
        held = self._truth[tier]
        left, came = sorted(keys & held), sorted(keys - held)
        held ^= keys
        changes = [Change(EventKind.REMOVED, tier, left, ()), Change(EventKind.ADDED, tier, came, ())]
        self._watch.note([change for change in changes if change.keys])

    def _listed(self) -> dict[Tier, list[bytes]]:
        """What a listing says that takes place between two changes."""
        while self._meanwhile:
            self._turn(*self._meanwhile.pop())
        return {tier: sorted(keys) for tier, keys in self._truth.items()}

    def teardown(self) -> None:
        self.hear_all()
        self._watch.end()
        assert list(self._news) == []
        self._parts.stop()


TestFollowingMachine = FollowingMachine.TestCase
TestFollowingMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
