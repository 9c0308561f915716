"""Slots and transfer schedulers of two ranks together, beside plain models (laws L3, L4 and L6)."""

from __future__ import annotations

import pytest
from hypothesis import settings

from umbp_core.testing.machines_together import TogetherMachine

TestTogether = pytest.mark.statement("connector", 26)(TogetherMachine.TestCase)
TestTogether.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)
