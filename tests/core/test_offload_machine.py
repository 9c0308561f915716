"""The frequency policy beside counts that are lowered one by one; time, repetition and a full table included."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from umbp_core.offload import Frequency, OffloadRun
from umbp_core.testing.models_offload import FrequencyModel

KEYS = [b"%d" % number for number in range(14)]
WINDOW_S = 600.0


class FrequencyMachine(RuleBasedStateMachine):
    """Blocks are seen, and time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    @initialize(
        sightings=st.integers(1, 4),
        capacity=st.integers(1, 8),
        begun=st.floats(0, 1e6),
        most=st.sampled_from((4, 1024)),
    )
    def open(self, sightings: int, capacity: int, begun: float, most: int) -> None:
        """The clock has any value when the first block comes, and counts have any limit."""
        self.now = begun
        self.policy = Frequency(sightings, WINDOW_S, capacity)
        self.policy.MOST_COUNT = most  # a low one is reached within a test
        self.model = FrequencyModel(sightings, WINDOW_S, capacity, most)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=6))
    def see(self, keys: Sequence[bytes]) -> None:
        """The same blocks may go, the same ones twice in a run included."""
        assert self.policy.admit(OffloadRun(keys), self.now) == self.model.admit(keys, self.now)

    @rule(seconds=st.sampled_from((1.0, 599.0, 600.0, 3_000.0)))
    def wait(self, seconds: float) -> None:
        """Nobody looks meanwhile."""
        self.now += seconds

    @invariant()
    def agrees(self) -> None:
        """Every block has the model's count, and what is kept is bounded."""
        self.policy.pass_time(self.now)
        self.model.pass_time(self.now)
        assert {key: count for key in KEYS if (count := self.policy.count(key))} == self.model.counts
        assert self.policy.counted == len(self.model.counts) <= self.policy.kept <= self.model.capacity


FrequencyMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestFrequency = FrequencyMachine.TestCase
