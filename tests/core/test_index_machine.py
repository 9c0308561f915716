"""The public hypothesis machines of the indexes and the journal, run against our own parts (laws L7 and L11)."""

from __future__ import annotations

import unittest

from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine

from umbp_core.testing.machines_index import BlockIndexMachine, IndexMachine, JournalMachine


def sized(machine: type[RuleBasedStateMachine], examples: int) -> type[unittest.TestCase]:
    """The test case of ``machine`` with a budget of a few seconds."""
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=40, deadline=None)
    return machine.TestCase


TestIndex = sized(IndexMachine, 150)
TestBlockIndex = sized(BlockIndexMachine, 120)
TestJournal = sized(JournalMachine, 150)
