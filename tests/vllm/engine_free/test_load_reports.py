"""What vLLM is told of loads: which blocks are bad, on which rank and when; and what the counters say of both."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction
from umbp_core.tiers import Tier

HYBRID = (GroupSpec("full"), GroupSpec("window", window=10))


class Reports:
    """What every rank said, step by step: requests received, requests failed, bad blocks."""

    def __init__(self, engine: UmbpHarness) -> None:
        self.steps: list[list[tuple[set[str], set[str], set[int]]]] = [[] for _ in engine.ranks]
        self.loads: list[list[int]] = []
        observe, build = engine.ledger.observe, engine.leader.build_connector_meta

        def observed(outputs: Any) -> None:
            for rank, output in enumerate(outputs):
                bad = set(output.invalid_block_ids or ())
                self.steps[rank].append((set(output.finished_recving or ()), set(output.failed_recving or ()), bad))
            observe(outputs)

        def built(output: Any) -> Any:
            metadata = build(output)
            loads = [op for op in metadata.ops if op.direction is Direction.LOAD] + metadata.layerwise
            self.loads += [[block.hbm_block for block in op.blocks] for op in loads]
            return metadata

        engine.ledger.observe = observed  # type: ignore[method-assign]
        engine.leader.build_connector_meta = built


@pytest.mark.statement("connector", 51)
@pytest.mark.parametrize("mode", ["async", "layerwise"])
@pytest.mark.parametrize("block", range(6))
@pytest.mark.parametrize("rank", [0, 1])
def test_exactly_the_bad_block_is_named_by_the_rank_that_has_it(
    make_umbp: MakeUmbp, mode: str, block: int, rank: int
) -> None:
    """Not later than in the step in which the request is received, and never again."""
    engine = make_umbp({"load_mode": mode}, tp=2)
    engine.store(tokens(24))
    engine.corrupt(rank, engine.keys(tokens(24))[0][block])
    reports = Reports(engine)
    name = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    (loaded,) = reports.loads
    for number, steps in enumerate(reports.steps):
        bad = [named for _, _, named in steps if named]
        assert bad == ([{loaded[block]}] if number == rank else [])
        received = [index for index, (recving, _, _) in enumerate(steps) if name in recving]
        assert len(received) == (mode == "async")
        assert all(index <= received[0] for index, step in enumerate(steps) if step[2] and received)
    assert engine.finish_reasons[name] == "length"
    engine.close()


@pytest.mark.statement("connector", 51)
@pytest.mark.parametrize("rank", [0, 1])
def test_with_several_groups_the_request_is_named(make_umbp: MakeUmbp, rank: int) -> None:
    """And received in the same step; blocks of several groups cannot be named."""
    engine = make_umbp(groups=HYBRID, tp=2)
    engine.store(tokens(24))
    engine.corrupt(rank, engine.keys(tokens(24))[0][2])
    reports = Reports(engine)
    name = engine.add(tokens(26), max_tokens=3)
    engine.drain()
    for number, steps in enumerate(reports.steps):
        assert not any(bad for _, _, bad in steps)
        said = [(recving, failed) for recving, failed, _ in steps if recving or failed]
        assert said == [({name}, {name} if number == rank else set())]
    assert engine.finish_reasons[name] == "length"
    engine.close()


@pytest.mark.statement("connector", 96)
@pytest.mark.statement("connector", 62)
def test_a_completion_that_comes_twice_is_reported_once(make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 says everything again in every step, rank 1 says nothing: vLLM, which only counts, must not free."""
    engine = make_umbp(tp=2)
    engine.store(tokens(24))
    engine.copiers[1].hold(Direction.LOAD)
    transfer = engine.workers[0].engine
    poll, said = transfer.poll, list[Any]()

    def poll_again() -> list[Any]:
        said.extend(poll())
        return [*said, *said]

    monkeypatch.setattr(transfer, "poll", poll_again)
    name = engine.add(tokens(24))
    engine.step_until(lambda: bool(engine.ledger.lives[name].recving[0]))
    for _ in range(10):
        engine.step()
    assert dict(engine.ledger.lives[name].recving) == {0: 1}
    assert engine.scheduler.requests[name].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    engine.copiers[1].release(Direction.LOAD)
    engine.drain()
    assert dict(engine.ledger.lives[name].recving) == {0: 1, 1: 1}
    assert engine.finish_reasons[name] == "length"
    engine.close()


@pytest.mark.statement("connector", 56)
@pytest.mark.bug("B14")
@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD])
def test_blocks_are_counted_when_they_have_arrived(make_umbp: MakeUmbp, tmp_path: Path, tier: Tier) -> None:
    """Not when they are asked for; those that fail have a counter of their own, with the reason."""
    engine = make_umbp({"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}, tp=2)
    engine.hold(Direction.STORE)
    stored = engine.add(tokens(24), max_tokens=1)
    engine.run_until_finished(stored)
    for _ in range(3):
        engine.step()
    assert engine.stat("stored_blocks", "dram") == engine.stat("bytes", "store", "dram") == 0
    engine.release(Direction.STORE)
    engine.drain()
    assert engine.stat("stored_blocks", "dram") == 6
    part = engine.stat("bytes", "store", "dram") / 12  # of one block on one of the two ranks
    assert engine.stat("bytes", "demote", "ssd") == 12 * part
    engine.reset_prefix_cache()
    if tier is Tier.SSD:
        engine.drop_from(Tier.DRAM)
    engine.corrupt(1, engine.keys(tokens(24))[0][4], tier)
    engine.hold(Direction.LOAD)
    name = engine.add(tokens(26), max_tokens=2)
    for _ in range(3):
        engine.step()
    label = tier.name.lower()
    assert (engine.stat("hit_tokens", label), engine.stat("loaded_blocks", label)) == (24, 0)
    engine.release(Direction.LOAD)
    engine.drain()
    assert engine.finish_reasons[name] == "length"
    assert engine.stat("loaded_blocks", label) == 5
    assert engine.stat("failed_blocks", "load", "verify") == 1
    other = "ssd" if label == "dram" else "dram"
    assert (engine.stat("bytes", "load", label), engine.stat("bytes", "load", other)) == (11 * part, 0)
    engine.close()


@pytest.mark.statement("connector", 56)
def test_the_time_of_transfers_is_counted(make_umbp: MakeUmbp, tmp_path: Path) -> None:
    engine = make_umbp({"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}, tp=2)
    begin = time.monotonic()
    for _ in range(2):
        engine.store(tokens(24))
    elapsed = time.monotonic() - begin
    for direction in ("store", "load", "demote"):
        assert 0 < engine.stat("op_seconds", direction) <= elapsed * engine.stat("ops", direction, "done")
    engine.close()


@pytest.mark.statement("connector", 56)
def test_a_store_that_fails_counts_as_failed_and_as_nothing_else(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(tp=2)
    engine.copiers[1].fails.add(Direction.STORE)
    engine.store(tokens(24))
    assert engine.stat("stored_blocks", "dram") == 0
    assert engine.stat("failed_blocks", "store", "device") == 6
    engine.close()
