"""Counters that are found by row, while rows change hands and counters are forgotten, beside a plain model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from umbp_core.hits import HitCounters
from umbp_core.testing.models_index import HitModel

KEYS = [b"%d" % number for number in range(12)]
TTL = 4.0


class HitsMachine(RuleBasedStateMachine):
    """An owner puts keys into rows, takes them out, and counts hits of keys and of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.hits = HitCounters(TTL)
        self.model = HitModel(TTL)
        self.rows: list[bytes | None] = [None] * 9
        """Row 0 is nobody's."""

    @rule(row=st.integers(1, 8), key=st.sampled_from(KEYS))
    def put(self, row: int, key: bytes) -> None:
        """A row gets another hash; a hash is in one row at most."""
        if self.rows[row] is None and key not in self.rows:
            self.hits.forget_rows([row])
            self.rows[row] = key

    @precondition(lambda self: None in self.rows[1:])
    @rule()
    def fill(self) -> None:
        """All free rows get hashes."""
        free = [row for row in range(1, 9) if self.rows[row] is None]
        self.hits.forget_rows(free)
        for row, key in zip(free, [key for key in KEYS if key not in self.rows], strict=False):
            self.rows[row] = key

    @rule(row=st.integers(1, 8))
    def take(self, row: int) -> None:
        """Nothing is said when a row loses its hash."""
        self.rows[row] = None

    @rule(start=st.integers(1, 8), count=st.integers(1, 8))
    def hit_rows(self, start: int, count: int) -> None:
        """Hits of rows that follow each other."""
        hashes = [key for key in self.rows[start : start + count] if key is not None]
        if len(hashes) == len(self.rows[start : start + count]):
            self.hits.record_rows(hashes, start, self.now)
            self.model.record(hashes, self.now)

    @rule(hashes=st.lists(st.sampled_from(KEYS), max_size=4))
    def hit(self, hashes: list[bytes]) -> None:
        """Hits of hashes, wherever they are."""
        self.hits.record(hashes, self.now)
        self.model.record(hashes, self.now)

    @rule(seconds=st.sampled_from((1.0, 3.0)))
    def wait(self, seconds: float) -> None:
        """Time passes, and old counters go."""
        self.now += seconds
        assert self.hits.collect(self.now) == self.model.collect(self.now)

    @invariant()
    def counts(self) -> None:
        """Those of the model."""
        assert self.hits.counts(KEYS) == {key: count for key, (count, _) in self.model.hits.items()}


HitsMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestHits = HitsMachine.TestCase
