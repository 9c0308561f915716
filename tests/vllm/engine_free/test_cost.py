"""What a step costs the scheduler, in calls: they are counted, because a clock says what a machine does besides.

The clock's side is ``benchmarks/leader.py``.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_connectors.leader import ledger
from umbp_core.ids import block_key
from umbp_core.tiers import Tier

BLOCK = 64
QUIET_STEPS = 20
FOR_A_QUIET_STEP = 60
"""Calls, of Python and C functions together; each is some 50 ns, and a step has 1 ms."""

FOR_A_BLOCK_OF_A_HIT = 8
"""Calls, counted the same way."""


CHANGES = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
    "has_pending_push_work",
)
"""What vLLM's scheduler calls when something changes."""


@pytest.fixture(autouse=True)
def nobody_is_asked_what_became_of_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine the time for it would come in the middle of a test, and count."""
    monkeypatch.setattr(ledger, "HEARTBEAT_S", 3600.0)


@pytest.fixture(autouse=True)
def no_garbage_is_collected() -> Iterator[None]:
    """What it ends, of other tests, would count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@contextmanager
def counted(connector: Any, *methods: str) -> Iterator[list[int]]:
    """How many calls each call of one of ``methods`` made within the block."""
    made: list[int] = []

    def counting(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls = 0

            def count(frame: Any, event: str, argument: Any) -> None:
                nonlocal calls
                calls += event in ("call", "c_call")

            sys.setprofile(count)
            try:
                return method(*arguments)
            finally:
                sys.setprofile(None)
                made.append(calls)

        return call

    originals = {name: getattr(connector, name) for name in methods}
    for name, method in originals.items():
        setattr(connector, name, counting(method))
    try:
        yield made
    finally:
        for name, method in originals.items():
            setattr(connector, name, method)


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
    with counted(engine.scheduler.connector, "build_connector_meta") as steps:
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


def calls_of_changes(make_umbp: MakeUmbp, running: int) -> list[int]:
    """Steps in each of which a request with a hit arrives, the one of the step before runs, and another one ends."""
    engine = make_umbp(
        {"dram_capacity": "64MiB", "share_load_timeout_ms": 0},
        block_size=BLOCK,
        num_blocks=4 * running + 8 * QUIET_STEPS,
        max_num_seqs=running + QUIET_STEPS,
        max_num_batched_tokens=2048,
    )
    engine.pace()
    for number in range(QUIET_STEPS):
        engine.store(tokens(2 * BLOCK, first=200 * number))
    names = [engine.add(tokens(2, first=10_000 + number), max_tokens=4 * QUIET_STEPS) for number in range(running)]
    for _ in range(6):
        engine.step()
    steps = []
    for number in range(QUIET_STEPS):
        with counted(engine.scheduler.connector, *CHANGES) as made:
            engine.add(tokens(2 * BLOCK + 3, first=200 * number), max_tokens=4 * QUIET_STEPS)
            engine.abort(names[number])
            engine.step()
        steps.append(sum(made))
    engine.drain()
    return steps[2:]


@pytest.mark.statement("connector", 95)
def test_what_changes_costs_the_same_however_much_does_not(make_umbp: MakeUmbp) -> None:
    few, many = (calls_of_changes(make_umbp, running) for running in (QUIET_STEPS + 4, 256))
    assert few == many
    assert min(few) > FOR_A_QUIET_STEP


def calls_of_a_hit(make_umbp: MakeUmbp, blocks: int) -> int:
    """From the arrival of a request with a hit of so many blocks to the end of its load."""
    engine = make_umbp({"dram_capacity": "64MiB"}, block_size=16, num_blocks=512, max_model_len=2048)
    engine.pace()
    prompt = tokens(16 * blocks)
    engine.store(prompt)
    with counted(engine.scheduler.connector, *CHANGES) as made:
        name = engine.add([*prompt, 7], max_tokens=1)
        engine.drain()
    assert engine.external_tokens(name) == len(prompt)
    return sum(made)


@pytest.mark.statement("connector", 95)
def test_a_block_of_a_hit_costs_a_few_calls(make_umbp: MakeUmbp) -> None:
    """Hits may have thousands of blocks; what can be done for all at once is."""
    few, many = calls_of_a_hit(make_umbp, 4), calls_of_a_hit(make_umbp, 68)
    assert (many - few) / 64 <= FOR_A_BLOCK_OF_A_HIT
