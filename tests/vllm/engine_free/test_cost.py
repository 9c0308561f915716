"""What a step costs the scheduler, in calls: they are counted, because a clock says what a machine does besides.

The clock's side is ``benchmarks/leader.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ids import block_key
from umbp_core.tiers import Tier

BLOCK = 64
QUIET_STEPS = 20
FOR_A_QUIET_STEP = 60
"""Calls, of Python and C functions together; each is some 50 ns, and a step has 1 ms."""


@contextmanager
def counted(connector: Any) -> Iterator[list[int]]:
    """How many calls each ``build_connector_meta`` of the block made."""
    steps: list[int] = []
    build: Callable[[Any], Any] = connector.build_connector_meta

    def counting(output: Any) -> Any:
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            return build(output)
        finally:
            sys.setprofile(None)
            steps.append(calls)

    connector.build_connector_meta = counting
    try:
        yield steps
    finally:
        connector.build_connector_meta = build


def calls_of_quiet_steps(make_umbp: MakeUmbp, running: int, cached: int) -> list[int]:
    """Steps in which ``running`` requests decode and none fills a block, with ``cached`` blocks in the pool."""
    engine = make_umbp(
        {"dram_capacity": (cached + 1000) * 64 * 1024, "store_decode_blocks": True},
        block_size=BLOCK,
        num_blocks=2 * running + 8,
        max_num_seqs=running,
        max_num_batched_tokens=1024,
    )
    fill(engine, cached)
    for number in range(running):
        engine.add(tokens(2, first=number), max_tokens=QUIET_STEPS + 20)
    for _ in range(6):
        engine.step()
    with counted(engine.scheduler.connector) as steps:
        for _ in range(QUIET_STEPS):
            engine.step()
    engine.drain()
    return steps


def fill(engine: UmbpHarness, cached: int) -> None:
    """Put blocks into the pool that no request asks for."""
    directory = engine.pool.directory
    keys = [block_key(number.to_bytes(32, "big"), 0) for number in range(cached)]
    for key in keys:
        assert directory.reserve("fill", key, Tier.DRAM, 1) is not None
    directory.commit_many("fill", dict.fromkeys(keys, b""), Tier.DRAM)
    engine.pool.settle()


@pytest.mark.statement("connector", 95)
def test_a_step_without_changes_costs_the_same_however_much_runs_and_is_cached(make_umbp: MakeUmbp) -> None:
    few = calls_of_quiet_steps(make_umbp, running=4, cached=10)
    many = calls_of_quiet_steps(make_umbp, running=256, cached=10)
    full = calls_of_quiet_steps(make_umbp, running=256, cached=5000)
    assert sorted(few)[len(few) // 2] == sorted(many)[len(many) // 2] == sorted(full)[len(full) // 2]
    assert max(many) == max(full)
    assert sorted(many)[len(many) // 2] <= FOR_A_QUIET_STEP
