"""vLLM goes to sleep: its HBM goes away, and comes back with other content (laws L1 and L3)."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction
from umbp_vllm import worker as worker_module

WAIT_S = 60.0


def storing(engine: UmbpHarness) -> None:
    """A request is over, and every rank is in the middle of its stores."""
    engine.hold(Direction.STORE)
    engine.run_until_finished(engine.add(tokens(24), max_tokens=1))
    engine.step_until(lambda: all(copier.entered[Direction.STORE].is_set() for copier in engine.copiers))


def fall_asleep(engine: UmbpHarness) -> None:
    """What vLLM calls on every rank before it takes the memory away."""
    for rank in engine.ranks:
        rank.connector.unregister_kv_caches()


@pytest.mark.parametrize("spec", [{}, {"tp": 2}], ids=["one rank", "two ranks"])
def test_it_sleeps_when_the_copies_have_ended(make_umbp: MakeUmbp, spec: dict[str, Any]) -> None:
    engine = make_umbp(**spec)
    storing(engine)
    asleep = threading.Thread(target=fall_asleep, args=[engine])
    asleep.start()
    asleep.join(0.1)
    assert asleep.is_alive(), "the memory is still being read"
    engine.release(Direction.STORE)
    asleep.join(WAIT_S)
    assert not asleep.is_alive()
    assert not any(worker.engine.pending() for worker in engine.workers)
    engine.drain()
    assert all(engine.present(tokens(24)))
    assert engine.check_stored() >= 6
    engine.close()


def test_a_copy_that_outlasts_the_patience_is_void(make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "FENCE_S", 0.05)
    engine = make_umbp()
    storing(engine)
    fall_asleep(engine)
    engine.release(Direction.STORE)
    engine.drain()
    assert not any(engine.present(tokens(24))), "nobody knows what it has read"
    engine.check_stored()
    engine.close()


def test_without_copies_it_sleeps_at_once_and_goes_on_afterwards(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    fall_asleep(engine)
    engine.run_until_finished(engine.add(tokens(24), max_tokens=1))
    engine.drain()
    fall_asleep(engine)
    assert all(engine.present(tokens(24)))
    engine.close()
