"""Random work over a host daemon that is killed, hangs, forgets and comes back: every token and every byte is right."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.connectors.waiting import until
from tests.vllm.engine_free.test_host import UNEVEN
from tests.vllm.harness.fake_daemon import FakeDaemon
from tests.vllm.harness.host import HostHarness
from tests.vllm.harness.traffic import Traffic
from umbp_vllm import host_loans

STEPS = 120
PROMPT = list(range(1, 98))


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """The daemon of this host; nobody wrote to or published a page that was not granted."""
    daemon = FakeDaemon(pages=160)
    daemon.serve(monkeypatch)
    yield daemon
    assert not daemon.faults
    assert not daemon.scribbled()


def upset(daemon: FakeDaemon, rng: random.Random) -> None:
    """Perhaps something happens to the daemon."""
    chance = rng.random()
    if chance < 0.03 and not daemon.down:
        daemon.kill()
    elif chance < 0.10 and daemon.down:
        daemon.restart()
    elif chance < 0.12:
        daemon.answers.clear()
    elif chance < 0.25:
        daemon.answers.set()
    elif chance < 0.28 and not daemon.fails:
        daemon.fails.append(rng.choice(("look_up", "borrow", "publish", "take_pages", "give_back", "clear")))
    elif chance < 0.29 and not daemon.down and daemon.name:
        daemon.forget_objects()


@pytest.mark.parametrize(
    "options",
    [{}, {"tp": 2}, {"async_scheduling": True}, {"num_blocks": 72}, UNEVEN],
    ids=["one", "tp2", "async", "preemptions", "stages"],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_daemon_that_is_upset_costs_hits_only(daemon: FakeDaemon, options: dict[str, object], seed: int) -> None:
    rng = random.Random(seed)
    extra = {"lookup_timeout_ms": 20, "call_timeout_ms": 50}
    with HostHarness(daemon, extra, **options) as engine:
        traffic = Traffic(engine, rng)
        for _ in range(STEPS):
            traffic.act()
            upset(daemon, rng)
        if daemon.down:
            daemon.restart()
        daemon.fails.clear()
        daemon.answers.set()
        engine.drain()
        engine.check_stored()
        engine.step_until(lambda: is_served(engine))


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_a_daemon_that_lends_little_at_once_is_asked_for_no_more(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, most: int, seed: int
) -> None:
    """Requests wait for each other's loans, and load what a daemon without this bound would have lent them."""
    monkeypatch.setattr(host_loans, "HELD", most)
    daemon.most_loans, daemon.objects = most, 512
    with HostHarness(daemon) as engine:
        Traffic(engine, random.Random(seed)).run(steps=STEPS)
        engine.check_stored()
        assert engine.stat("hit_tokens", "dram") > 0
        assert engine.stat("degraded", "too_many_loans") == engine.stat("degraded", "daemon_late") == 0
    assert not daemon.refused_loans
    until(lambda: not daemon.pinned())


def is_served(engine: HostHarness) -> bool:
    """Store a prompt and ask for it again; whether it came from the daemon."""
    engine.store(PROMPT)
    name = engine.add(PROMPT, max_tokens=1)
    engine.run_until_finished()
    return engine.external_tokens(name) > 0


def test_two_engines_at_once_serve_each_other(daemon: FakeDaemon) -> None:
    rng = random.Random(7)
    with HostHarness(daemon) as first, HostHarness(daemon) as second:
        traffics = [Traffic(engine, random.Random(9)) for engine in (first, second)]
        for _ in range(2 * STEPS):
            rng.choice(traffics).act()
        for engine in (first, second):
            engine.drain()
            assert engine.check_stored() > 0
        assert first.stat("hit_tokens", "dram") + second.stat("hit_tokens", "dram") > 0
    until(lambda: not daemon.pinned())
