"""The long random runs of ``test_machine``, with a real master that must know the truth whenever one looks."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.master.app.master_process import MasterProcess
from tests.vllm.engine_free.test_machine import POOLS, SHAPES, UmbpMachine
from tests.vllm.harness.reported import FLUSH, difference, held_by, known_at, reporter_of


@functools.cache
def master() -> MasterProcess:
    """One process for all examples; the engines have different names in it."""
    return MasterProcess(Path(tempfile.mkdtemp(prefix="umbp-master-"))).__enter__()


class ReportingMachine(UmbpMachine):
    """As its base; what the engine holds and what the master knows is compared between any two steps."""

    @initialize(
        shape=st.sampled_from(SHAPES),
        pool=st.sampled_from(POOLS),
        blocks=st.sampled_from([32, 48, 90]),
        ssd=st.booleans(),
    )
    def start(self, shape: dict[str, Any], pool: dict[str, Any], blocks: int, ssd: bool) -> None:
        self.client = master().native()
        self.node_id = f"node-{id(self)}-{self.folder.name}"
        told = {"master_address": f"umbp://{master().doors['native']}", "node_id": self.node_id}
        super().start(shape, {**pool, **told}, blocks, ssd)

    @precondition(lambda self: self.engine is not None)
    @rule()
    def look(self) -> None:
        engine = self.running
        assert reporter_of(engine.leader).flush(FLUSH)
        held = held_by(engine.scheduler, engine.leader.leader.pool)  # type: ignore[attr-defined]
        known = known_at(self.client, self.node_id)
        assert known == held, difference(known, held)

    def teardown(self) -> None:
        try:
            if self.engine is not None and self.engine.healthy:
                self.look()
            super().teardown()
        finally:
            if self.engine is not None:
                self.client.close()


ReportingMachine.TestCase.settings = settings(
    max_examples=12, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestReportingMachine = ReportingMachine.TestCase


def teardown_module() -> None:
    if master.cache_info().currsize:
        master().__exit__()
