"""The public hypothesis machines, run against our own parts (laws L2 and L8)."""

from __future__ import annotations

import unittest

from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine

from umbp_core.eviction import EvictionPolicy, PrefixAwareLruPolicy
from umbp_core.grouping import BlockOf
from umbp_core.testing.machines_directory import DirectoryMachine
from umbp_core.testing.machines_pages import EvictionPolicyMachine, LeaseMachine, PageMachine
from umbp_core.testing.models_directory import PrefixAwareLruModel

WINDOW = 3


class PrefixAwarePolicyMachine(EvictionPolicyMachine):
    def new_policy(self) -> EvictionPolicy:
        return PrefixAwareLruPolicy(WINDOW)

    def new_model(self) -> EvictionPolicy:
        return PrefixAwareLruModel(WINDOW)


class ModellessPolicyMachine(EvictionPolicyMachine):
    """A third party's policy that has no model is held to the promises of every policy."""

    def new_model(self) -> None:
        return None


class PrefixAwareDirectoryMachine(DirectoryMachine):
    def new_policy(self) -> EvictionPolicy:
        return PrefixAwareLruPolicy(WINDOW)

    def new_model(self) -> EvictionPolicy:
        return PrefixAwareLruModel(WINDOW)


class BlockDirectoryMachine(DirectoryMachine):
    """The parts of a block leave together."""

    def block_of(self) -> BlockOf:
        return lambda key: bytes([(key[0] - 1) // 2]) if key[0] < ord("e") else None


class PrefixAwareBlockMachine(BlockDirectoryMachine, PrefixAwareDirectoryMachine):
    """Whose end of the chain goes first."""


def sized(machine: type[RuleBasedStateMachine], examples: int) -> type[unittest.TestCase]:
    """The test case of ``machine`` with a budget of a second or two."""
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=40, deadline=None)
    return machine.TestCase


TestPages = sized(PageMachine, 60)
TestLeases = sized(LeaseMachine, 100)
TestLru = sized(EvictionPolicyMachine, 60)
TestPrefixAwareLru = sized(PrefixAwarePolicyMachine, 60)
TestModelless = sized(ModellessPolicyMachine, 60)
TestDirectory = sized(DirectoryMachine, 150)
TestPrefixAwareDirectory = sized(PrefixAwareDirectoryMachine, 150)
TestBlockDirectory = sized(BlockDirectoryMachine, 150)
TestPrefixAwareBlocks = sized(PrefixAwareBlockMachine, 100)
