"""What a dump says of requests in each phase (statement 94)."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest

from tests.connectors.waiting import PATIENCE
from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction


def row(engine: UmbpHarness, name: str) -> dict[str, Any]:
    """What the leader's dump says of one request, as it comes out of a door."""
    state = msgspec.json.decode(msgspec.json.encode(engine.leader.dump_state()))
    (found,) = [row for row in state["requests"] if row["slot"].startswith(f"{name}#")]
    return found


@pytest.mark.statement("connector", 94)
def test_a_request_in_every_phase(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(num_blocks=25, max_model_len=64)
    engine.store(tokens(48))
    engine.hold(Direction.STORE)
    engine.add(tokens(60, 500), max_tokens=3, request_id="storing")
    engine.step()
    waiting = engine.add(tokens(50), max_tokens=2)
    engine.step()
    storing = row(engine, "storing")
    assert (storing["life"], storing["transaction"]) == ("DECODING", "STORING")
    assert [op["direction"] for op in storing["ops"]] == ["store"]
    assert 0 <= storing["ops"][0]["age_s"] < 60
    staged = row(engine, waiting)
    assert (staged["life"], staged["pins"], staged["tokens"]) == ("ONBOARD_STAGED", 12, 50)
    assert staged["waits_for"].startswith("a match of 48 tokens")
    engine.release(Direction.STORE)
    engine.hold(Direction.LOAD)
    engine.step_until(lambda: bool(engine.ledger.lives[waiting].loads))
    loading = row(engine, waiting)
    assert (loading["life"], loading["transaction"], loading["pins"]) == ("ONBOARDING", "LOADING", 12)
    assert loading["waits_for"] == f"its load {loading['ops'][0]['op']}"
    engine.abort(waiting)
    finishing = row(engine, waiting)
    assert (finishing["life"], len(finishing["ops"])) == ("FINISHING", 1)
    engine.release(Direction.LOAD)
    engine.drain()
    assert engine.leader.dump_state()["requests"] == []
    engine.close()


@pytest.mark.statement("connector", 94)
def test_ops_tiers_and_the_ranks_that_are_waited_for(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(tp=2)
    engine.store(tokens(24))
    engine.copiers[1].hold(Direction.LOAD)
    name = engine.add(tokens(24))
    engine.step_until(lambda: bool(engine.ledger.lives[name].recving[0]))
    engine.step()
    assert engine.copiers[1].entered[Direction.LOAD].wait(PATIENCE)
    state = engine.leader.dump_state()
    (op,) = state["ops"]
    assert (op["request"], op["direction"], op["blocks"], op["waits_for"]) == (name, "load", 6, [1])
    (dram,) = state["tiers"]
    assert (dram["tier"], dram["objects"], dram["pinned"]) == ("DRAM", 6, 6)
    other, stuck = (rank.connector.dump_state() for rank in engine.ranks)
    assert (other["rank"], other["ops"], stuck["rank"]) == (0, [], 1)
    (there,) = stuck["ops"]
    assert (there["op_id"], there["phase"], stuck["loads_not_reported"]) == (op["op"], "COMMITTED", 1)
    engine.release(Direction.LOAD)
    engine.drain()
    engine.close()


@pytest.mark.statement("connector", 94)
def test_before_the_pool_is_open(make_umbp: MakeUmbp) -> None:
    engine = make_umbp(shake_hands=False)
    name = engine.add(tokens(24))
    assert "not open" in engine.leader.dump_state()["pool"]
    engine.leader.get_num_new_matched_tokens(engine.scheduler.requests[name], 0)
    assert row(engine, name)["waits_for"].startswith("another request's load or the workers")
    engine.drain()
    engine.close()


@pytest.mark.statement("connector", 94)
def test_exceptions_that_the_boundary_caught_are_in_it(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    engine.expects_internal_failures = True
    engine.leader.on_new_request(None)
    assert engine.leader.dump_state()["failures"] == {"on_new_request": 1}
    engine.close()


def test_a_busy_engine_makes_it_between_two_steps(make_umbp: MakeUmbp) -> None:
    """And an idle one lets it be read: the same requests either way."""
    engine = make_umbp({"debug_socket": True})
    window = engine.leader._window
    assert window is not None
    assert window.path is not None
    window._desk._patience_s = PATIENCE
    running = engine.add(tokens(10), max_tokens=50)
    engine.step()
    found: list[Any] = []
    asker = threading.Thread(target=lambda: found.append(window._desk.take()))
    asker.start()
    while not window.asked and asker.is_alive():
        asker.join(0.001)
    engine.step()
    asker.join(PATIENCE)
    (state,) = found
    assert state["taken"] == "between two steps"
    assert [row["slot"].partition("#")[0] for row in state["requests"]] == [running]
    engine.drain()
    window._desk._patience_s = 0.01
    assert window._desk.take()["taken"].startswith("from outside")
    path = window.path
    engine.close()
    assert not path.exists()
