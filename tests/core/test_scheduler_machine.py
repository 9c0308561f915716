"""Random halves, progress, cancellations and results beside a plain model (law L4)."""

from __future__ import annotations

from hypothesis import settings

from umbp_core.testing.machines_transfer import SchedulerMachine

TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
