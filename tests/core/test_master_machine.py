"""The public hypothesis machine of the master's state, run against our own (laws L7 and L11)."""

from __future__ import annotations

from hypothesis import settings

from umbp_core.testing.machines_master import MasterMachine

MasterMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestMaster = MasterMachine.TestCase
