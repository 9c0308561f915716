"""Stores that take each layer when it is done (``store_granularity="layer"``), on a real engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.vllm.engine.leaks import nothing_lost
from tests.vllm.engine.local import BLOCK, Ask, Engine, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt
from umbp_core.errors import TransferError
from umbp_vllm import bands

LAYERS = 4
PATIENCE = 60.0


@pytest.fixture(scope="module", params=["async", "layerwise"])
def shared(llama: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """One engine for the tests of this module, with either kind of load; each test uses prompts of its own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(bands, "BAND_BYTES", 1)  # a band per layer, in a model as small as this one
    settings = pool(store_granularity="layer", load_mode=request.param)
    with engine(llama, kv_transfer_config=settings) as opened:
        yield opened
    patch.undo()


class Bands:
    """The copies of bands towards DRAM: noted, and stopped or broken where a test wants it."""

    def __init__(self, opened: Engine, patch: pytest.MonkeyPatch) -> None:
        self.copied: list[int] = []
        self.entered = [threading.Event() for _ in range(LAYERS)]
        self.broken: set[int] = set()
        self.go_on = threading.Event()
        self.held: set[int] = set()
        self._gather_band = opened.copier.gather_band
        patch.setattr(opened.copier, "gather_band", self.gather_band)

    def gather_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        self.entered[band].set()
        if band in self.held:
            assert self.go_on.wait(PATIENCE), "the test never let the copy go on"
        if band in self.broken:
            raise TransferError("the test broke this copy")
        self._gather_band(group, band, blocks, pages, fence)
        self.copied.append(band)


@pytest.fixture
def copies(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> Bands:
    return Bands(shared, monkeypatch)


def layer_bytes(opened: Engine, block: int) -> bytes:
    """KV block ``block`` of all layers in layer order, from the engine's own tensors."""
    layers = opened.core.scheduler.kv_cache_config.kv_cache_groups[0].layer_names
    caches = opened.kv_caches()
    return b"".join(caches[name][block].contiguous().numpy().tobytes() for name in layers)


@pytest.mark.parametrize(("blocks", "more"), [(1, 1), (3, 0), (8, 17)])
def test_tokens_and_contents(
    shared: Engine, oracle: Oracle, llama: Path, copies: Bands, blocks: int, more: int
) -> None:
    """What was stored layer by layer is, byte for byte, what the engine has in HBM, and gives the same tokens."""
    ask = Ask(prompt(blocks * BLOCK + more, seed=10 * blocks), max_tokens=2 * BLOCK)
    (right,) = oracle.ask(llama, ask)
    with nothing_lost(shared):
        name = shared.add(ask)
        shared.step()
        own = [layer_bytes(shared, block) for block in shared.blocks_of(name)[:blocks]]
        cold = shared.run()[name]
        shared.drain()
        stored = [bytes(shared.arena.page(page))[: len(own[0])] for page in shared.pages_of(ask)]
        shared.forget()
        warm = shared.ask_one(ask)
    assert stored == own
    assert cold.tokens == warm.tokens == right.tokens
    assert warm.cached in (blocks * BLOCK, len(ask.prompt) - 1)
    assert set(copies.copied) == set(range(LAYERS))


@pytest.mark.statement("connector", 40)
def test_the_first_layers_are_in_dram_before_the_last_one_is_computed(
    shared: Engine, copies: Bands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L2: and until the step has ended nobody can match the block."""
    ask = Ask(prompt(4 * BLOCK + 3, seed=500), max_tokens=2)
    layers = shared.core.scheduler.kv_cache_config.kv_cache_groups[0].layer_names
    seen: list[tuple[bool, list[int], int]] = []
    layer_done = shared.worker.layer_done

    def noted(name: str) -> None:
        if name == layers[-1]:  # it is computed, and nobody has been told yet
            before = copies.entered[LAYERS - 2].wait(PATIENCE)
            seen.append((before, sorted(copies.copied)[: LAYERS - 2], len(shared.pages_of(ask))))
            assert not copies.entered[LAYERS - 1].is_set()
        layer_done(name)

    monkeypatch.setattr(shared.worker, "layer_done", noted)
    with nothing_lost(shared):
        shared.ask_one(ask)
    assert seen[0] == (True, [0, 1], 0)
    assert len(shared.pages_of(ask)) == 4


@pytest.mark.statement("connector", 50)
@pytest.mark.parametrize("band", range(LAYERS))
def test_a_layer_that_cannot_be_copied_publishes_nothing(
    shared: Engine, oracle: Oracle, llama: Path, copies: Bands, band: int
) -> None:
    """L2: the block is a miss, the tokens are right, and the next time it is stored whole."""
    ask = Ask(prompt(3 * BLOCK + 2, seed=600 + band))
    failed = shared.metric("vllm:umbp_failed_blocks", direction="store")
    copies.broken = {band}
    with nothing_lost(shared):
        first = shared.ask_one(ask)
        shared.forget()
        assert shared.pages_of(ask) == []
        copies.broken = set()
        second = shared.ask_one(ask)
        shared.forget()
        third = shared.ask_one(ask)
    (right,) = oracle.ask(llama, ask)
    assert first.tokens == second.tokens == third.tokens == right.tokens
    assert (second.cached, third.cached) == (0, 3 * BLOCK)
    assert shared.metric("vllm:umbp_failed_blocks", direction="store") >= failed + 3


@pytest.mark.statement("connector", 60)
@pytest.mark.parametrize("band", [0, LAYERS - 1])
def test_an_abort_between_two_layers(shared: Engine, oracle: Oracle, llama: Path, copies: Bands, band: int) -> None:
    """L3: the request is gone at once, its blocks stay out of use until the store has read every layer of them."""
    ask = Ask(prompt(5 * BLOCK + 1, seed=700 + band), max_tokens=40)
    other = Ask(prompt(2 * BLOCK + 1, seed=710 + band))
    copies.held = {band}
    with nothing_lost(shared):
        name = shared.add(ask)
        shared.step()
        assert copies.entered[band].wait(PATIENCE)
        shared.abort(name)
        shared.step()
        assert len(shared.leader.held)
        around = shared.add(other)
        replies = shared.run()
        copies.go_on.set()
    assert replies[around].tokens == oracle.ask(llama, other)[0].tokens
    shared.forget()
    again = shared.ask_one(ask)
    assert again.cached == 5 * BLOCK
    assert again.tokens == oracle.ask(llama, ask)[0].tokens


def test_many_at_once(shared: Engine, oracle: Oracle, llama: Path) -> None:
    """Prompts in chunks, decoding beside them, hits and misses mixed; twice, the second time from the pool."""
    asks = [Ask(prompt(60 + 37 * number, seed=800 + number), max_tokens=BLOCK + 5) for number in range(8)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    with nothing_lost(shared):
        cold = shared.ask(*asks)
        shared.forget()
        warm = shared.ask(*asks)
    assert [reply.tokens for reply in cold] == right
    assert [reply.tokens for reply in warm] == right
    assert shared.metric("vllm:umbp_ops", direction="load", status="done") >= 8
