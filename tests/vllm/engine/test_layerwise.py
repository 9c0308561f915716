"""Loads that the forward pass waits for, layer by layer (``load_mode="layerwise"``), on a real engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.vllm.engine.faults import stored
from tests.vllm.engine.local import BLOCK, Ask, Engine, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt
from umbp_vllm import bands, layer_gate

BLOCKS = 6


@pytest.fixture(scope="module")
def shared(llama: Path) -> Iterator[Engine]:
    """One engine for the tests of this module; each uses prompts of its own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(bands, "BAND_BYTES", 1)  # a band per layer, in a model as small as this one
    settings = pool(load_mode="layerwise")
    with engine(llama, kv_transfer_config=settings) as opened:
        yield opened
    patch.undo()


@pytest.fixture
def free_blocks(shared: Engine) -> Iterator[None]:
    """vLLM has as many free blocks after the test as before."""
    shared.drain()
    block_pool = shared.core.scheduler.kv_cache_manager.block_pool
    before = block_pool.get_num_free_blocks()
    yield
    shared.drain()
    assert block_pool.get_num_free_blocks() == before
    assert not len(shared.leader.held)


def test_tokens(shared: Engine, oracle: Oracle, llama: Path, free_blocks: None) -> None:
    for blocks, more in ((1, 1), (3, 0), (8, 17)):
        ask = Ask(prompt(blocks * BLOCK + more, seed=10 * blocks))
        cold = shared.ask_one(ask)
        shared.forget()
        loads = shared.metric("vllm:umbp_ops", direction="load", status="done")
        warm = shared.ask_one(ask)
        (right,) = oracle.ask(llama, ask)
        assert cold.tokens == warm.tokens == right.tokens
        assert warm.cached == min(blocks * BLOCK, len(ask.prompt) - 1)
        assert shared.metric("vllm:umbp_ops", direction="load", status="done") == loads + 1


@pytest.mark.parametrize("index", [0, 3, BLOCKS - 1])
def test_a_block_whose_bytes_changed_in_dram(
    shared: Engine, oracle: Oracle, llama: Path, free_blocks: None, index: int
) -> None:
    """L1: no token that was computed with it ever leaves the engine."""
    ask = stored(shared, BLOCKS, seed=100 + index)
    shared.arena.page(shared.pages_of(ask)[index])[1234] ^= 0x10
    wrong_before = shared.metric("vllm:umbp_failed_blocks", direction="load", reason="verify")
    reply = shared.ask_one(ask)
    shared.forget()
    again = shared.ask_one(ask)
    (right,) = oracle.ask(llama, ask)
    assert reply.tokens == again.tokens == right.tokens
    assert shared.metric("vllm:umbp_failed_blocks", direction="load", reason="verify") == wrong_before + 1
    assert again.cached == BLOCKS * BLOCK, "the bad block was not replaced by the recomputed one"


def test_several_requests_of_which_one_load_fails(
    shared: Engine, oracle: Oracle, llama: Path, free_blocks: None
) -> None:
    """Two of them are alike: the second one must not build on what the first one has not got."""
    asks = [stored(shared, BLOCKS, seed=200 + number) for number in range(3)]
    asks.append(asks[1])
    shared.arena.page(shared.pages_of(asks[1])[2])[77] ^= 0x10
    replies = shared.ask(*asks)
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in oracle.ask(llama, *asks)]


class SlowBand:
    """Stops the copies of one band until it is let go."""

    def __init__(self, opened: Engine, patch: pytest.MonkeyPatch, band: int) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self._band = band
        self._scatter_band = opened.copier.scatter_band
        patch.setattr(opened.copier, "scatter_band", self.scatter_band)

    def scatter_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        if band == self._band:
            self.entered.set()
            assert self.go_on.wait(60), "the test never let the copy go on"
        self._scatter_band(group, band, blocks, pages, fence)


def test_a_load_that_misses_its_deadline(
    shared: Engine, oracle: Oracle, llama: Path, monkeypatch: pytest.MonkeyPatch, free_blocks: None
) -> None:
    """L4, L6: the step ends, its tokens are void, and the blocks stay out of use until the copy has ended."""
    ask = stored(shared, BLOCKS, seed=300)
    pages = shared.pages_of(ask)
    slow = SlowBand(shared, monkeypatch, band=1)
    monkeypatch.setattr(layer_gate, "GRACE_S", 0.1)
    gate = shared.worker.gate
    start = gate.start

    def start_and_hang(iteration: int, fence: object) -> None:
        start(iteration, fence)
        assert slow.entered.wait(60)
        monkeypatch.setattr(gate, "_clock", lambda: time.monotonic() + 3600)

    monkeypatch.setattr(gate, "start", start_and_hang)
    failed = shared.metric("vllm:umbp_ops", direction="load", status="failed")
    reply = shared.ask_one(ask)
    assert slow.entered.is_set()
    (right,) = oracle.ask(llama, ask)
    assert reply.tokens == right.tokens
    assert shared.metric("vllm:umbp_ops", direction="load", status="failed") == failed + 1
    assert len(shared.leader.held), "the copy that hangs still has its blocks"
    assert shared.connector.has_pending_push_work()
    slow.go_on.set()
    shared.drain()
    assert not len(shared.leader.held)
    monkeypatch.undo()
    assert shared.pages_of(ask) == pages, "what is right in DRAM stays there"
    shared.forget()
    assert shared.ask_one(ask).tokens == right.tokens


def test_a_copy_that_is_merely_slow(
    shared: Engine, oracle: Oracle, llama: Path, monkeypatch: pytest.MonkeyPatch, free_blocks: None
) -> None:
    """The forward pass waits for a later layer, and does not begin to use it before."""
    ask = stored(shared, BLOCKS, seed=400)
    slow = SlowBand(shared, monkeypatch, band=1)
    waited = []
    wait_layers = shared.worker.engine.wait_layers

    def seen(ops: Sequence[str], bands: int, timeout: float) -> bool:
        waited.append(bands)
        if bands > 1:
            assert slow.entered.wait(60)
            slow.go_on.set()
        return wait_layers(ops, bands, timeout)

    monkeypatch.setattr(shared.worker.engine, "wait_layers", seen)
    reply = shared.ask_one(ask)
    (right,) = oracle.ask(llama, ask)
    assert (reply.tokens, reply.cached) == (right.tokens, BLOCKS * BLOCK)
    assert waited == [1, 2, 3, 4], "once per layer"


def test_aborts(shared: Engine, oracle: Oracle, llama: Path, free_blocks: None) -> None:
    """Before the step that loads, between it and the next one, and while others go on."""
    asks = [stored(shared, BLOCKS, seed=500 + number) for number in range(4)]
    names = [shared.add(ask) for ask in asks]
    shared.abort(names[0])
    shared.step()
    shared.abort(names[1])
    replies = shared.run()
    right = oracle.ask(llama, *asks[2:])
    assert [replies[name].tokens for name in names[2:]] == [reply.tokens for reply in right]
