"""Stores that begin before their step has ended: what they read and when, and who may find what they bring."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connectors.waiting import PATIENCE
from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.errors import TransferError
from umbp_core.ops import Direction, RequirementKind
from umbp_vllm import bands
from umbp_vllm.compat import why_not_store_by_layer

BY_LAYER = {"store_granularity": "layer"}
SHAPES: list[dict[str, Any]] = [
    {},
    {"tp": 2},
    {"pp": 2},
    {"groups": (GroupSpec("mla", head_size=16),), "tp": 2},
    {"groups": (GroupSpec("full"), GroupSpec("window", window=10))},
    {"layout": "BLHNC"},
    {"v2_runner": True},
    {"async_scheduling": True},
]


@pytest.fixture(autouse=True)
def _a_band_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "BAND_BYTES", 1)


def bands_copied(engine: UmbpHarness, rank: int = 0) -> list[int]:
    """Notes which bands a rank's stores take from now on; -1 for a whole block."""
    copier, copied = engine.copiers[rank], list[int]()
    gather, gather_band = copier.gather, copier.gather_band

    def noted(*arguments: Any) -> None:
        copied.append(-1)
        gather(*arguments)

    def band_noted(group: int, band: int, *rest: Any) -> None:
        copied.append(band)
        gather_band(group, band, *rest)

    copier.gather, copier.gather_band = noted, band_noted  # type: ignore[method-assign]
    return copied


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_stored_layer_by_layer_and_found_again(make_umbp: MakeUmbp, shape: dict[str, Any]) -> None:
    """The harness compares what is stored with the model, and every byte that is read."""
    engine = make_umbp(BY_LAYER, **shape)
    copied = bands_copied(engine)
    engine.store(tokens(40))
    assert copied
    assert set(copied) >= {0}
    assert engine.check_stored() >= 10 * len(engine.ranks)
    engine.add(tokens(42), max_tokens=20)
    engine.drain()
    assert engine.stat("ops", "load", "done") == 1
    engine.check_stored()
    engine.close()


def test_whole_blocks_are_the_default(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    copied = bands_copied(engine)
    engine.store(tokens(24))
    assert set(copied) == {-1}
    engine.close()


@pytest.mark.parametrize("tp", [1, 2])
def test_the_first_layers_leave_while_the_last_one_is_computed(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch, tp: int
) -> None:
    """L2, L3: and nobody finds the block before all of it is there."""
    engine = make_umbp(BY_LAYER, tp=tp)
    (copier, *_), (rank, *_) = engine.copiers, engine.ranks
    last = rank.layers[-1].name
    before_last: list[bool] = []
    wait = rank.connector.wait_for_layer_load

    def wait_for_layer_load(name: str) -> None:
        if name == last and engine.workers[0].stores_by_layer:
            before_last.append(copier.entered[Direction.STORE].wait(PATIENCE))
            before_last.append(any(engine.present(tokens(24))))
        wait(name)

    monkeypatch.setattr(rank.connector, "wait_for_layer_load", wait_for_layer_load)
    engine.store(tokens(24))
    assert before_last == [True, False]
    assert all(engine.present(tokens(24)))
    engine.check_stored()
    engine.close()


@pytest.mark.statement("connector", 50)
@pytest.mark.statement("connector", 53)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("band", [0, 1])
def test_one_layer_of_one_rank_fails(make_umbp: MakeUmbp, rank: int, band: int) -> None:
    """L2: the block is published by nobody, and the next time it is stored again."""
    engine = make_umbp(BY_LAYER, tp=2)
    copier = engine.copiers[rank]
    gather_band = copier.gather_band

    def broken(group: int, number: int, *rest: Any) -> None:
        if number == band:
            raise TransferError("the test broke this copy")
        gather_band(group, number, *rest)

    copier.gather_band = broken  # type: ignore[method-assign]
    engine.store(tokens(24))
    assert not any(engine.present(tokens(24)))
    assert engine.stat("failed_blocks", "store", "device") == 6
    copier.gather_band = gather_band  # type: ignore[method-assign]
    engine.store(tokens(24))
    assert all(engine.present(tokens(24)))
    engine.check_stored()
    engine.close()


def test_a_rank_that_is_late_with_a_layer(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(BY_LAYER, tp=2)
    engine.copiers[1].hold(Direction.STORE)
    name = engine.add(tokens(24), max_tokens=2)
    engine.run_until_finished(name)
    for _ in range(5):
        engine.step()
    assert not any(engine.present(tokens(24)))
    assert len(engine.pool.held), "vLLM must not reuse what a rank still has to read"
    engine.release(Direction.STORE)
    engine.drain()
    assert all(engine.present(tokens(24)))
    engine.close()


def test_what_ends_with_its_last_step_is_stored_whole(make_umbp: MakeUmbp) -> None:
    """The end of a request is decided after its step, when no layer of it will be computed any more."""
    engine = make_umbp(BY_LAYER)
    seen: list[Any] = []
    build = engine.leader.build_connector_meta
    engine.leader.build_connector_meta = lambda output: (seen.append(build(output)), seen[-1])[1]
    engine.add(tokens(24), max_tokens=9)
    engine.drain()
    kinds = {op.requirement.kind for metadata in seen for op in metadata.ops}
    assert kinds <= {RequirementKind.LAYER_COMPLETE, RequirementKind.ITERATION_COMPLETE}
    for metadata in seen:
        for op in metadata.ops:
            same = op.requirement.iteration == metadata.iteration
            assert same == (op.requirement.kind is RequirementKind.LAYER_COMPLETE)
    engine.check_stored()
    engine.close()


@pytest.mark.parametrize("place", ["store_ahead", "layer_done"])
def test_a_bug_of_ours_costs_the_overlap_and_nothing_else(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = make_umbp(BY_LAYER)

    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.workers[0], place, fail)
    engine.expects_internal_failures = True
    engine.store(tokens(24))
    assert all(engine.present(tokens(24)))
    engine.check_stored()
    engine.close()


def test_with_loads_by_layer(make_umbp: MakeUmbp) -> None:
    """Both ways at once: a step may load some blocks and fill others."""
    engine = make_umbp({**BY_LAYER, "load_mode": "layerwise"}, tp=2)
    engine.store(tokens(24))
    engine.corrupt(0, engine.keys(tokens(24))[0][4])
    for first in (0, 300):
        engine.add(tokens(24, first) + tokens(16, 900), max_tokens=12)
    engine.drain()
    engine.check_stored()
    engine.close()


@pytest.mark.parametrize(
    ("spec", "why"),
    [({"draft_tokens": 2}, "speculative decoding"), ({"layout": "BHLNC"}, "cannot be told apart")],
)
def test_where_it_changes_nothing_the_log_says_so(
    make_umbp: MakeUmbp, spec: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_umbp({**BY_LAYER, "log_level": "warning"}, **spec)
    assert "blocks are stored whole although store_granularity is layer" in caplog.text
    assert why in caplog.text
    engine.store(tokens(24))
    engine.add(tokens(26))
    engine.drain()
    assert engine.stat("hit_tokens", "dram") == 24, "and every byte of it was compared when it was read"
    engine.close()


def test_microbatches_are_recognised(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(BY_LAYER)
    parallel = engine.config.parallel_config
    assert why_not_store_by_layer(engine.config) is None
    for field, value in (("enable_dbo", True), ("ubatch_size", 2)):
        before = getattr(parallel, field)
        setattr(parallel, field, value)
        assert "microbatches" in str(why_not_store_by_layer(engine.config))
        setattr(parallel, field, before)
    engine.close()
