"""HBM that is too small, and stores that are still under way when a request loses its blocks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.vllm.engine.gates import CopyGate
from tests.vllm.engine.leaks import nothing_lost
from tests.vllm.engine.local import BLOCK, Ask, Engine, Reply, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt
from umbp_core.ops import Direction
from umbp_core.slot_table import Transaction
from umbp_vllm import bands

PATIENCE = 150.0


class Preemptions:
    """How many requests lost their blocks, and how many of them while stores were reading some."""

    def __init__(self, opened: Engine) -> None:
        self.all = self.with_stores = 0
        self._leader = opened.leader
        self._preempted = opened.leader._preempted
        opened.leader._preempted = self.preempted

    def preempted(self, request_ids: Iterable[str]) -> None:
        """As the leader is told."""
        names = list(request_ids)
        states = [self._leader._requests.get(name) for name in names]
        self.all += len(names)
        self.with_stores += sum(bool(state and state.slot.ops) for state in states)
        self._preempted(names)


def as_before_0_30(small: Engine, gate: CopyGate, patch: pytest.MonkeyPatch) -> None:
    """vLLM preempts at once: it cannot be told to wait for blocks under a store."""
    patch.setattr(small.connector, "has_pending_block_frees", lambda: False)


def as_it_is(small: Engine, gate: CopyGate, patch: pytest.MonkeyPatch) -> None:
    """vLLM waits for blocks under a store before it preempts anybody."""


def reset_while_running(small: Engine, gate: CopyGate, patch: pytest.MonkeyPatch) -> None:
    """All requests are preempted and no reference keeps their blocks; the next step waits for the stores."""
    fence, step, live = small.worker.fence, small.step, small.leader._requests
    resets: list[int] = []

    def passing_fence(metadata: Any) -> None:
        gate.open()
        fence(metadata)

    def step_and_reset() -> dict[str, Reply]:
        replies = step()
        stores = any(state.slot.transaction is Transaction.STORING for state in live.values())
        # vLLM itself cannot reset while a request that does not run has blocks: it loads, or has just been loaded.
        others = [r for r in small.core.scheduler.requests.values() if r.status is not RequestStatus.RUNNING]
        manager = small.core.scheduler.kv_cache_manager
        loads = any(manager.get_block_ids(request.request_id)[0] for request in others)
        if stores and not loads and len(resets) < 3:
            resets.append(1)
            assert small.llm.reset_prefix_cache(reset_running_requests=True)
        return replies

    patch.setattr(small.worker, "fence", passing_fence)
    patch.setattr(small, "step", step_and_reset)


Kind = Callable[[Engine, CopyGate, pytest.MonkeyPatch], None]


@pytest.mark.statement("connector", 68)
@pytest.mark.statement("connector", 69)
@pytest.mark.statement("connector", 100)
@pytest.mark.bug("B10")
@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        (as_it_is, "block"),
        (as_before_0_30, "block"),
        (as_before_0_30, "layer"),
        (reset_while_running, "block"),
        (reset_while_running, "layer"),
    ],
)
def test_preemption_while_blocks_are_being_stored(
    oracle: Oracle, llama: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, granularity: str
) -> None:
    """L3: no store reads a block that has a new owner; what was stored is found with the right bytes afterwards."""
    asks = [Ask(prompt(130 + 11 * n, seed=2000 + n), max_tokens=3 * BLOCK) for n in range(5)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    monkeypatch.setattr(bands, "BAND_BYTES", 1)
    settings = pool(store_granularity=granularity)
    with engine(llama, kv_transfer_config=settings, num_gpu_blocks_override=24, max_model_len=512) as small:
        gate = CopyGate(small.worker.engine)
        preemptions = Preemptions(small)
        with nothing_lost(small):
            names = [small.add(ask) for ask in asks]
            kind(small, gate, monkeypatch)
            cold = run_with_stores_held(small, gate, preemptions)
            monkeypatch.undo()
        assert not small.connector.has_pending_block_frees()
        small.forget()
        before = small.external_tokens()
        warm = small.ask(*asks)
        assert small.external_tokens() > before
    assert preemptions.all > 0
    assert bool(preemptions.with_stores) == (kind is not as_it_is)
    assert [cold[name].tokens for name in names] == right
    assert [reply.tokens for reply in warm] == right


def run_with_stores_held(opened: Engine, gate: CopyGate, preemptions: Preemptions) -> dict[str, Reply]:
    """Until all are through; three times stores are held until one sees its request preempted, or for some steps."""
    replies: dict[str, Reply] = {}
    seen = -1
    deadline = time.monotonic() + PATIENCE
    for number in itertools.count():
        assert time.monotonic() < deadline, "requests are still unfinished"
        if number in (0, 50, 100):
            seen = preemptions.with_stores
            gate.hold(Direction.STORE)
        if number % 50 == 40 or preemptions.with_stores > seen:
            gate.open()
        replies |= opened.step()
        if not opened.llm.llm_engine.has_unfinished_requests():
            gate.open()
            break
    return replies
