"""A channel that cannot be trusted, for the Hypothesis machines of whatever talks over one (law L11)."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from umbp_core.index import ExternalKvIndex
from umbp_core.index_gate import Acknowledgement, Batch, BatchApplier

IN_FLIGHT = 8
"""Messages, and answers, that the channel holds at most; the oldest are lost first."""


class ChannelMachine(RuleBasedStateMachine):
    """Batches on their way to a receiver and its answers on their way back: lost, repeated and out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Batch] = []
        self.answers: list[Acknowledgement] = []
        self.new_receiver()

    def new_receiver(self) -> None:
        """The receiver begins again and knows nothing."""
        self.index = ExternalKvIndex()
        self.applier = BatchApplier(self.index)

    def transmit(self, *batches: Batch) -> None:
        """Put ``batches`` on the channel, from where they may never arrive."""
        self.messages = [*self.messages, *batches][-IN_FLIGHT:]

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), keep=st.booleans(), lose=st.booleans())
    def deliver(self, data: st.DataObject, keep: bool, lose: bool) -> None:
        """Any message, once or several times; the answer may be lost."""
        batch = data.draw(st.sampled_from(self.messages))
        if not keep:
            self.messages.remove(batch)
        answer = self.applier.apply("node", batch)
        if not lose:
            self.answers = [*self.answers, answer][-IN_FLIGHT:]
