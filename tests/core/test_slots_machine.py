"""Random lives of requests beside a plain model (laws L4 and L6)."""

from __future__ import annotations

from hypothesis import settings

from umbp_core.testing.machines_slots import SlotMachine

TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
