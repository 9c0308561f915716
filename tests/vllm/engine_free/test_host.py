"""The engine over a host daemon that answers, late, never, or with another incarnation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.connectors.waiting import until
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.fake_daemon import FakeDaemon
from tests.vllm.harness.host import HostHarness
from umbp_core.ops import Direction
from umbp_core.tiers import Tier

PROMPT = list(range(1, 97))
OTHER = list(range(200, 296))

UNEVEN = {"pp": 2, "groups": (GroupSpec(layers=3, heads=4, head_size=64),)}
"""The first stage has two layers and pages of 8192 bytes, the second one layer and pages of half of that."""
STAGED = [
    UNEVEN,
    {"pp": 2, "groups": (GroupSpec(layers=1), GroupSpec("window", layers=1, window=10)), "async_scheduling": True},
    {"pp": 2, "tp": 2, "groups": (GroupSpec("mla", layers=3),)},
]
STAGED_IDS = ["uneven", "other-groups", "replicated"]

Start = Callable[..., HostHarness]


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    """The daemon of this host."""
    daemon = FakeDaemon()
    daemon.serve(monkeypatch)
    return daemon


@pytest.fixture
def start(daemon: FakeDaemon) -> Iterator[Start]:
    """Starts engines; at the end nothing is left, in them or in the daemon."""
    engines: list[HostHarness] = []

    def begin(**options: Any) -> HostHarness:
        engine = HostHarness(daemon, **options)
        engines.append(engine)
        return engine

    yield begin
    daemon.answers.set()
    for engine in engines:
        engine.close()
    until(lambda: daemon.down or not daemon.pinned())
    assert not daemon.faults
    assert daemon.down or not daemon.scribbled()


@pytest.mark.parametrize(
    "options", [{}, {"tp": 2}, {"async_scheduling": True}, *STAGED], ids=["one", "tp2", "async", *STAGED_IDS]
)
def test_what_one_engine_stored_another_loads(start: Start, options: dict[str, Any]) -> None:
    start(**options).store(PROMPT)
    second = start(**options)
    assert second.hits(PROMPT) >= len(PROMPT) - 16
    assert second.check_stored() > 0


def test_a_prompt_that_is_there_is_not_stored_again(daemon: FakeDaemon, start: Start) -> None:
    start().store(PROMPT)
    second = start()
    second.hits(PROMPT, max_tokens=1)
    second.drain()
    assert second.stat("stored_blocks", "dram") == 0


def test_two_engines_that_compute_the_same_at_once_keep_one_copy(daemon: FakeDaemon, start: Start) -> None:
    first, second = start(), start()
    for engine in (first, second):
        engine.hold(Direction.STORE)
        engine.add(PROMPT, max_tokens=1)
        engine.run_until_finished()
    for engine in (first, second):
        engine.release(Direction.STORE)
        engine.drain()
    assert first.check_stored() > 0
    assert second.stat("stored_blocks", "dram") == 0
    assert second.host.stats(Tier.DRAM).reserved == 0


def test_an_engine_without_a_daemon_computes_and_uses_the_one_that_comes(daemon: FakeDaemon, start: Start) -> None:
    daemon.down = True
    engine = start()
    assert engine.hits(PROMPT) == 0
    daemon.down = False
    engine.step_until(engine.is_attached)
    engine.store(OTHER)
    assert engine.hits(OTHER) > 0


@pytest.mark.parametrize("tp", [1, 2])
def test_a_daemon_that_comes_back_is_used_again(daemon: FakeDaemon, start: Start, tp: int) -> None:
    engine = start(tp=tp)
    engine.store(PROMPT)
    daemon.kill()
    assert engine.hits(PROMPT) == 0
    daemon.restart()
    engine.step_until(engine.is_attached)
    assert engine.hits(OTHER) == 0
    engine.drain()
    assert engine.reset_prefix_cache()
    assert engine.hits(OTHER) > 0
    assert engine.stat("degraded", "daemon_gone") == 1


def test_copies_under_way_when_the_daemon_dies_harm_nobody(daemon: FakeDaemon, start: Start) -> None:
    engine = start()
    engine.store(PROMPT)
    engine.hold(Direction.LOAD)
    engine.hold(Direction.STORE)
    engine.add(PROMPT, max_tokens=2)
    engine.add(OTHER, max_tokens=2)
    engine.step_until(lambda: all(copier.entered[Direction.LOAD].is_set() for copier in engine.copiers))
    daemon.kill()
    daemon.restart()
    engine.release(Direction.LOAD)
    engine.release(Direction.STORE)
    engine.run_until_finished()
    engine.step_until(engine.is_attached)
    engine.drain()
    assert not daemon.scribbled()
    assert engine.hits(PROMPT) == 0


def test_a_daemon_that_hangs_costs_hits_and_the_lookup_timeout(daemon: FakeDaemon, start: Start) -> None:
    engine = start(extra={"lookup_timeout_ms": 20, "call_timeout_ms": 200})
    engine.store(PROMPT)
    daemon.answers.clear()
    assert engine.hits(PROMPT) == 0
    assert engine.stat("lookup_waits", "daemon") > 0
    daemon.answers.set()
    engine.step_until(engine.is_attached)
    engine.drain()


def test_an_answer_that_comes_too_late_gives_the_loan_back(
    daemon: FakeDaemon, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    engine.store(PROMPT)
    daemon.holds_at = "borrow"
    engine.add(PROMPT)
    engine.step_until(lambda: not daemon.answers.is_set())
    leader = engine.leader.leader
    clock = leader._clock
    monkeypatch.setattr(leader, "_clock", lambda: clock() + 3600)
    engine.run_until_finished()
    assert engine.stat("hit_tokens", "dram") == 0
    assert engine.stat("degraded", "daemon_late") == 1
    daemon.answers.set()
    engine.step_until(lambda: engine.is_attached() and "give_back" in daemon.calls)


def test_a_load_that_outlives_its_lease_does_not_count(
    daemon: FakeDaemon, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    engine.store(PROMPT)
    engine.hold(Direction.LOAD)
    engine.add(PROMPT, max_tokens=3)
    engine.step_until(lambda: all(copier.entered[Direction.LOAD].is_set() for copier in engine.copiers))
    daemon.forget_leases()
    for worker in engine.workers:
        monkeypatch.setattr(worker._host, "_clock", lambda: time.monotonic() + 3600)
    engine.release(Direction.LOAD)
    engine.run_until_finished()
    assert engine.stat("failed_blocks", "load", "lease") > 0


def test_an_object_that_does_not_verify_is_a_miss_and_doubted(daemon: FakeDaemon, start: Start) -> None:
    engine = start()
    engine.store(PROMPT)
    page, _, _ = daemon.objects_of[engine.keys(PROMPT)[0][0]]
    daemon.memory[page, 0, 5] ^= 1
    engine.rotten.update(daemon.objects_of)
    engine.hits(PROMPT)
    engine.drain()
    until(lambda: "doubt" in daemon.calls)
    assert engine.stat("failed_blocks", "load", "verify") > 0


def test_without_pages_in_stock_stores_are_dropped(daemon: FakeDaemon, start: Start) -> None:
    daemon.grants_nothing = True
    engine = start()
    engine.hits(PROMPT)
    engine.drain()
    assert engine.stat("dropped_stores", "no_room") > 0
    assert not daemon.objects_of


def test_a_reset_makes_the_daemon_forget(daemon: FakeDaemon, start: Start) -> None:
    engine = start()
    engine.store(PROMPT)
    assert engine.leader.reset_cache()
    assert engine.hits(PROMPT) == 0
    engine.drain()
    assert "clear" in daemon.calls


def test_a_reset_that_the_daemon_does_not_hear_keeps_everything_away(daemon: FakeDaemon, start: Start) -> None:
    engine = start(extra={"call_timeout_ms": 100})
    engine.store(PROMPT)
    daemon.fails.append("clear")
    assert engine.leader.reset_cache()
    assert engine.hits(PROMPT) == 0
    engine.step_until(engine.is_attached)
    assert daemon.calls.count("clear") == 2
    engine.drain()


def test_a_new_daemon_that_first_fails_to_forget_is_used_as_the_new_one(daemon: FakeDaemon, start: Start) -> None:
    engine = start(extra={"call_timeout_ms": 100})
    engine.store(PROMPT)
    daemon.kill()
    assert engine.leader.reset_cache()
    daemon.fails += ["clear", "clear"]
    daemon.restart()
    engine.step_until(engine.is_attached)
    engine.store(OTHER)
    assert engine.hits(OTHER) > 0
    assert engine.check_stored() > 0


def test_a_lost_publish_loses_its_pages_and_nothing_else(daemon: FakeDaemon, start: Start) -> None:
    engine = start(extra={"call_timeout_ms": 200})
    daemon.fails.append("publish")
    engine.store(PROMPT)
    assert engine.stat("dropped_stores", "daemon_gone") > 0
    engine.step_until(engine.is_attached)
    engine.store(OTHER)
    assert engine.hits(OTHER) > 0


def test_a_pool_that_is_full_goes_on(daemon: FakeDaemon, start: Start) -> None:
    daemon.pages = 24
    engine = start()
    for number in range(6):
        engine.store(list(range(100 * number + 1, 100 * number + 97)))
    assert engine.hits(list(range(501, 597))) > 0
