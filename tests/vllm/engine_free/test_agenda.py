"""The agenda beside a plain model that looks at every request of every step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from umbp_vllm.agenda import Agenda

STRIDE = 2
names = st.sampled_from([f"r{number}" for number in range(6)])


def output(scheduled: dict[str, int], new: set[str], resumed: set[str]) -> Any:
    """What vLLM's scheduler says about a step, as far as it counts here."""
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in scheduled if name in new],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={name for name in scheduled if name in resumed}),
    )


class AgendaMachine(RuleBasedStateMachine):
    """Requests come, take tokens, are skipped and go; none is looked at too late."""

    def __init__(self) -> None:
        super().__init__()
        self.agenda = Agenda(STRIDE)
        self.number = 0
        self.computed: dict[str, int] = {}
        self.quiet_until: dict[str, int] = {}
        self.new: set[str] = set()
        self.resumed: set[str] = set()
        self.before: set[str] = set()

    @rule(name=names)
    def arrive(self, name: str) -> None:
        """A request that is not there yet waits for its first step."""
        if name not in self.computed:
            self.computed[name] = 0
            self.new.add(name)

    @rule(name=names, comes_back=st.booleans())
    def go(self, name: str, comes_back: bool) -> None:
        """Finished, or preempted and then resumed from its first token."""
        if name in self.computed and name not in self.new:
            self.agenda.leave(name)
            self.before.discard(name)
            self.quiet_until.pop(name, None)
            self.resumed.discard(name)
            del self.computed[name]
            if comes_back:
                self.computed[name] = 0
                self.resumed.add(name)

    def _schedule(self, data: st.DataObject) -> dict[str, int]:
        tokens = st.sampled_from([0, 1, 1, 1, 1, 2, 7])
        drawn = {name: data.draw(tokens, label=name) for name in sorted(self.computed)}
        return {name: count for name, count in drawn.items() if count}

    def _start(self, scheduled: dict[str, int]) -> tuple[list[str], list[str], list[str]]:
        self.number += 1
        return self.agenda.step(self.number, output(scheduled, self.new, self.resumed))

    def _end(self, scheduled: dict[str, int]) -> None:
        for name, count in scheduled.items():
            self.computed[name] += count
        self.new -= scheduled.keys()
        self.resumed -= scheduled.keys()
        self.before = set(scheduled)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Everybody whose quiet time is over is named, and everybody who was not in the step before."""
        scheduled = self._schedule(data)
        joined, due, left = self._start(scheduled)
        assert set(left) == self.before - scheduled.keys()
        assert set(joined) >= scheduled.keys() - self.before
        assert set(joined) <= scheduled.keys()
        assert len(joined) == len(set(joined))
        over = {name for name, count in scheduled.items() if self._is_over(name, count)}
        assert over <= {*joined, *due}
        for name in {*joined, *due} & scheduled.keys():
            after = self.computed[name] + scheduled[name]
            if name in joined or after > self.quiet_until.get(name, -1):
                self.quiet_until[name] = after + data.draw(st.integers(-1, 9), label=f"quiet for {name}")
            self.agenda.meet(name, self.quiet_until[name] - after)
        self.agenda.seen()
        self._end(scheduled)

    def _is_over(self, name: str, count: int) -> bool:
        return self.computed[name] + count > self.quiet_until.get(name, -1)

    @rule(data=st.data(), lost=st.booleans())
    def broken_step(self, data: st.DataObject, lost: bool) -> None:
        """A step that goes wrong, before the agenda sees it or after; whom it would have named is named later."""
        scheduled = self._schedule(data)
        if lost:
            self.number += 1
        else:
            self._start(scheduled)
        for name in scheduled:
            if self._is_over(name, scheduled[name]) or name in self.new | self.resumed:
                self.quiet_until[name] = -1
        seen = self.before
        self._end(scheduled)
        if lost:
            self.before = seen

    @precondition(lambda self: not self.computed)
    @invariant()
    def nothing_is_kept(self) -> None:
        """Without requests only stale appointments are left, and they have no owner."""
        assert not self.agenda._next
        assert not self.agenda._running
        assert not self.agenda._absent

    @invariant()
    def members_are_those_of_the_last_step(self) -> None:
        """Whoever was in the last step is a member."""
        for name in self.before:
            assert name in self.agenda


TestAgenda = AgendaMachine.TestCase


def test_a_quiet_batch_costs_nothing() -> None:
    """In steps without an event nobody is named, whatever the number of running requests."""
    agenda = Agenda(1)
    batch = {str(number): 1 for number in range(1000)}
    agenda.step(1, output(batch, set(batch), set()))
    for name in batch:
        agenda.meet(name, 15)
    agenda.seen()
    for number in range(2, 17):
        assert agenda.step(number, output(batch, set(), set())) == ([], [], [])
        agenda.seen()
    joined, due, left = agenda.step(17, output(batch, set(), set()))
    assert (joined, set(due), left) == ([], set(batch), [])
