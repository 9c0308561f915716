"""Eviction by priority beside a list of what was said last."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from umbp_core.eviction import PriorityLruPolicy
from umbp_core.offload import DEFAULT_PRIORITY

KEYS = st.sampled_from([b"%d" % number for number in range(8)])


class PriorityMachine(RuleBasedStateMachine):
    """Keys come, are used, get priorities, and go."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = PriorityLruPolicy()
        self.model: list[tuple[bytes, int]] = []
        """Key and priority, the most recently used last."""

    def _last(self, key: bytes, priority: int) -> None:
        self.model = [item for item in self.model if item[0] != key] + [(key, priority)]

    @rule(key=KEYS, depth=st.integers(0, 3))
    def add(self, key: bytes, depth: int) -> None:
        """It is new, also when it is there."""
        self.policy.added(key, depth)
        self._last(key, DEFAULT_PRIORITY)

    @rule(key=KEYS)
    def touch(self, key: bytes) -> None:
        """It keeps its priority."""
        self.policy.touched(key)
        if key in dict(self.model):
            self._last(key, dict(self.model)[key])

    @rule(key=KEYS, priority=st.sampled_from((0, 10, DEFAULT_PRIORITY, 100)))
    def prioritise(self, key: bytes, priority: int) -> None:
        """It counts as used."""
        self.policy.prioritise(key, priority)
        if key in dict(self.model):
            self._last(key, priority)

    @rule(key=KEYS)
    def remove(self, key: bytes) -> None:
        """It is gone."""
        self.policy.removed(key)
        self.model = [item for item in self.model if item[0] != key]

    @invariant()
    def goes_in_the_models_order(self) -> None:
        """Python's sort is stable."""
        assert list(self.policy.victims()) == [key for key, _ in sorted(self.model, key=lambda item: item[1])]


PriorityMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPriority = PriorityMachine.TestCase
