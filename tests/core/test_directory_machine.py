"""The public hypothesis machines, run against our own parts (laws L2 and L8)."""

from __future__ import annotations

import unittest

from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine

from umbp_core.eviction import EvictionPolicy, PrefixAwareLruPolicy
from umbp_core.testing.machines_directory import (
    DirectoryMachine,
    EvictionPolicyMachine,
    LeaseMachine,
    PageMachine,
)
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


def sized(machine: type[RuleBasedStateMachine]) -> type[unittest.TestCase]:
    """The test case of ``machine``, with a budget that keeps the whole file within ten seconds."""
    machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
    return machine.TestCase


TestPages = sized(PageMachine)
TestLeases = sized(LeaseMachine)
TestLru = sized(EvictionPolicyMachine)
TestPrefixAwareLru = sized(PrefixAwarePolicyMachine)
TestModelless = sized(ModellessPolicyMachine)
TestDirectory = sized(DirectoryMachine)
TestPrefixAwareDirectory = sized(PrefixAwareDirectoryMachine)
