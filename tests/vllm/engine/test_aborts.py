"""Requests that are aborted in every phase of their life while others run: nothing is lost, no token is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.vllm.engine.gates import CopyGate
from tests.vllm.engine.leaks import nothing_lost
from tests.vllm.engine.local import BLOCK, Ask, Engine, Reply, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt
from umbp_core.ops import Direction
from umbp_core.slot_table import Life, Transaction

LOAD, STORE = Direction.LOAD, Direction.STORE
KNOWN = 5
"""Blocks of each prompt that the pool holds when a test begins."""
STEPS = 400

Aim = Callable[["Load", str], bool]


@pytest.fixture(scope="module")
def shared(llama: Path) -> Iterator[Engine]:
    """HBM for about four of the tests' eight requests, prompts in chunks of two blocks."""
    arguments = {"num_gpu_blocks_override": 40, "max_model_len": 512, "max_num_batched_tokens": 2 * BLOCK}
    settings = pool(share_load_timeout_ms=20)
    with engine(llama, kv_transfer_config=settings, enable_chunked_prefill=True, **arguments) as opened:
        yield opened


@pytest.fixture
def gate(shared: Engine) -> Iterator[CopyGate]:
    """Holds copies while a test wants it."""
    installed = CopyGate(shared.worker.engine)
    yield installed
    installed.remove()


class Load:
    """Eight requests on an engine with room for four: known prompts, new ones, and two that share a prefix."""

    def __init__(self, opened: Engine, seed: int, *, known_last: bool) -> None:
        self.opened = opened
        self.asks = [Ask(prompt(KNOWN * BLOCK + 9 + seed % 7, seed=seed), max_tokens=12)]
        self.asks.append(Ask([*self.asks[0].prompt[: KNOWN * BLOCK], *prompt(20, seed=seed + 1)]))
        self.asks += [Ask(prompt(150 + 17 * n, seed=seed + 2 + n), max_tokens=8 + 9 * n) for n in range(6)]
        for ask in self.asks[:4]:
            opened.ask_one(Ask(ask.prompt, max_tokens=1))
        if known_last:
            self.asks.reverse()
        opened.forget()
        self.names: list[str] = []
        self.replies: dict[str, Reply] = {}

    def begin(self) -> None:
        """Add all of them."""
        self.names = [self.opened.add(ask) for ask in self.asks]

    def step(self) -> None:
        """One step of the engine."""
        self.replies |= self.opened.step()

    def step_until(self, aim: Aim) -> str:
        """Step until a request is where it is to be aborted; which one."""
        for _ in range(STEPS):
            found = next((name for name in self.names if aim(self, name)), None)
            if found is not None:
                return found
            self.step()
        raise AssertionError(f"no request ever {aim.__name__.replace('_', ' ')}")

    def state(self, name: str) -> Any:
        """What the leader knows about a request."""
        live = self.opened.leader._requests
        return next((state for key, state in live.items() if key.startswith(f"{name}-")), None)

    def life(self, name: str) -> tuple[Life, Transaction] | None:
        """Where its slot is."""
        state = self.state(name)
        return None if state is None else (state.slot.life, state.slot.transaction)

    def started(self, name: str) -> bool:
        """Whether the worker has begun with its load."""
        state = self.state(name)
        lines = {line["op_id"]: line for line in self.opened.worker.engine.dump()}
        return state is not None and lines.get(state.loading, {}).get("phase") == "COMMITTED"


def waits_for_its_first_step(load: Load, name: str) -> bool:
    return load.life(name) == (Life.INITIALIZED, Transaction.NONE)


def has_a_match_and_no_room(load: Load, name: str) -> bool:
    return load.life(name) == (Life.ONBOARD_STAGED, Transaction.NONE)


def waits_for_the_load_of_another(load: Load, name: str) -> bool:
    state = load.state(name)
    return state is not None and state.asked_since is not None


def has_a_load_that_waits(load: Load, name: str) -> bool:
    life = load.life(name)
    return life is not None and life[1] is Transaction.LOADING and not load.started(name)


def has_a_load_that_writes(load: Load, name: str) -> bool:
    return load.started(name)


def has_just_been_loaded(load: Load, name: str) -> bool:
    arrived = load.opened.core.scheduler.finished_recving_kv_req_ids
    return any(request_id.startswith(f"{name}-") for request_id in arrived)


def computes_its_prompt(load: Load, name: str) -> bool:
    return load.life(name) == (Life.PREFILLING, Transaction.NONE)


def computes_its_prompt_and_stores(load: Load, name: str) -> bool:
    return load.life(name) == (Life.PREFILLING, Transaction.STORING)


def decodes_and_stores(load: Load, name: str) -> bool:
    return load.life(name) == (Life.DECODING, Transaction.STORING)


def decodes(load: Load, name: str) -> bool:
    return load.life(name) == (Life.DECODING, Transaction.NONE)


def was_preempted(load: Load, name: str) -> bool:
    life = load.life(name)
    return life is not None and life[0] is Life.PREEMPTED


class Phase(NamedTuple):
    """Where a request is when it is aborted.

    ``held`` are the copies that must be held for it to be seen there; ``known_last`` lets the requests that the pool
    knows wait for those that it does not know.
    """

    aim: Aim
    held: Direction | None = None
    known_last: bool = False


PHASES = [
    Phase(waits_for_its_first_step),
    Phase(has_a_match_and_no_room, known_last=True),
    Phase(waits_for_the_load_of_another, LOAD),
    Phase(has_a_load_that_waits, LOAD),
    Phase(has_a_load_that_writes, LOAD),
    Phase(has_just_been_loaded),
    Phase(computes_its_prompt),
    Phase(computes_its_prompt_and_stores, STORE),
    Phase(decodes_and_stores, STORE),
    Phase(decodes),
    Phase(was_preempted, known_last=True),
]


@pytest.mark.statement("connector", 64)
@pytest.mark.statement("connector", 60)
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.aim.__name__)
@pytest.mark.parametrize("during_the_step", [False, True], ids=["between", "during"])
def test_abort(
    shared: Engine, oracle: Oracle, llama: Path, gate: CopyGate, phase: Phase, during_the_step: bool
) -> None:
    """The others get their tokens, and all blocks come back, also those that a copy still touched (L3, L4, L6)."""
    load = Load(shared, seed=10 * PHASES.index(phase) + 1000, known_last=phase.known_last)
    with nothing_lost(shared):
        if phase.held is not None:
            gate.hold(phase.held)
        load.begin()
        victim = load.step_until(phase.aim)
        if during_the_step:
            abort_during_the_next_step(shared, victim)
        else:
            shared.abort(victim)
        load.step()
        assert load.life(victim) in (None, *[(Life.FINISHING, transaction) for transaction in Transaction])
        gate.open()
        load.replies |= shared.run()
    others = [name for name in load.names if name != victim]
    right = oracle.ask(llama, *[load.asks[load.names.index(name)] for name in others])
    assert [load.replies[name].tokens for name in others] == [reply.tokens for reply in right]


def abort_during_the_next_step(opened: Engine, name: str) -> None:
    """As a served engine does: aborts are taken between a step's execution and its output."""
    execute = opened.core.model_executor.execute_model

    def execute_and_abort(*arguments: Any, **more: Any) -> Any:
        opened.core.model_executor.execute_model = execute
        output = execute(*arguments, **more)
        opened.abort(name)
        return output

    opened.core.model_executor.execute_model = execute_and_abort
