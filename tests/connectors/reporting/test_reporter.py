"""The reporter's thread: when it reads, what a barrier is worth, what capacities are told, and how it ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, cast

import pytest

from tests.connectors.gate import Gate
from tests.connectors.reporting.told import Notes
from tests.connectors.waiting import until
from umbp_connectors.client.addresses import parse_addresses
from umbp_connectors.client.master_client import MasterClient
from umbp_connectors.reporting import reporter as module
from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.mirror import Mirror
from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.stats import REPORT_METRICS, Reading, ReporterStats, ReportMeter
from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.errors import MasterUnavailable
from umbp_core.master.model import Registration, TierCapacity

DRAM = 2
LONG = 60.0
NEVER = 3600.0


class Client(Notes):
    """A master's client that has everything acknowledged at once."""

    def __init__(self, native: bool = True) -> None:
        super().__init__()
        self.native = native
        self.said = threading.Event()
        self.started = self.closed = 0
        self.flushed: list[set[tuple[int, bytes]]] = []
        self.capacities: list[tuple[TierCapacity, ...]] = []
        self.told_capacities = threading.Event()
        nobody = MasterClient(parse_addresses("umbp://127.0.0.1:1"), Registration("n"), dial=_refuse)
        self._stats = replace(nobody.stats(), address="umbp://127.0.0.1:1")

    def start(self) -> None:
        self.started += 1

    def report(self, hashes: Sequence[bytes], tier: int) -> None:
        super().report(hashes, tier)
        self.said.set()

    def flush(self, timeout: float) -> bool:
        self.flushed.append(set(self.known))
        return timeout > 0

    def set_capacities(self, capacities: Sequence[TierCapacity]) -> None:
        self.capacities.append(tuple(capacities))
        self.told_capacities.set()

    def stats(self) -> Any:
        return replace(self._stats, native=self.native, hashes=len(self.known))

    def close(self, timeout: float) -> bool:
        self.closed += 1
        return True


def _refuse(address: object, timeout: float) -> Any:
    raise MasterUnavailable("nobody is there")


class Rig:
    def __init__(self, interval: float = 0.0, native: bool = True) -> None:
        self.client = Client(native)
        self.reporter = Reporter(cast(MasterClient, self.client), Mirror(), interval)
        self.held: list[bytes] = []
        self.feed: Feed[list[Word]] = self.reporter.feed("pool", lambda item: item, self._all)

    def add(self, key: bytes) -> None:
        self.held.append(key)
        self.feed.tell(1, [Word(WordKind.ADD, DRAM, [key])])

    def _all(self) -> list[Word]:
        return [Word(WordKind.REPLACE, DRAM, list(self.held))]


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    with ExitStack() as stack:

        def rig(**options: Any) -> Rig:
            made = Rig(**options)
            stack.enter_context(closing(made.reporter))
            return made

        yield rig


def test_what_is_told_before_the_start_is_told_after_it(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.add(b"a")
    assert rig.client.calls == []
    rig.reporter.start()
    rig.reporter.start()
    assert rig.client.said.wait(LONG)
    assert (rig.client.known, rig.client.started) == ({(DRAM, b"a")}, 1)


def test_the_first_change_is_told_at_once_and_those_of_an_interval_in_one_call(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(interval=0.5)
    call = Gate(rig.client.report)
    monkeypatch.setattr(rig.client, "report", call)
    rig.reporter.start()
    began = time.monotonic()
    rig.add(b"first")
    call.wait_until_held()
    for key in (b"a", b"b", b"c"):
        rig.add(key)
    call.open()
    until(lambda: len(rig.client.calls) == 2)
    assert time.monotonic() - began >= 0.5
    assert rig.client.calls == [("report", DRAM, (b"first",)), ("report", DRAM, (b"a", b"b", b"c"))]


def test_a_second_change_waits_for_its_interval_unless_there_is_a_barrier(make: Callable[..., Rig]) -> None:
    rig = make(interval=NEVER)
    rig.reporter.start()
    rig.add(b"first")
    assert rig.client.said.wait(LONG)
    rig.client.said.clear()
    rig.add(b"second")
    assert not rig.client.said.wait(0.05)
    assert rig.reporter.flush(LONG)
    assert rig.client.known == {(DRAM, b"first"), (DRAM, b"second")}


def test_a_barrier_waits_for_no_interval(make: Callable[..., Rig]) -> None:
    rig = make(interval=NEVER)
    rig.reporter.start()
    for key in (b"a", b"b"):
        rig.add(key)
        assert rig.reporter.flush(LONG)
    assert rig.client.flushed == [{(DRAM, b"a")}, {(DRAM, b"a"), (DRAM, b"b")}], "read before the client was asked"


def test_a_barrier_without_a_thread_is_not_reached(make: Callable[..., Rig]) -> None:
    rig = make()
    assert not rig.reporter.flush(LONG)
    rig.reporter.start()
    assert rig.reporter.flush(LONG)
    assert rig.reporter.close(LONG)
    assert not rig.reporter.flush(LONG)
    assert rig.reporter.close(LONG)


def test_the_end_ends_the_thread_and_what_is_told_later_is_dropped(make: Callable[..., Rig]) -> None:
    rig = make(interval=NEVER)
    rig.reporter.start()
    rig.add(b"a")
    assert rig.reporter.close(LONG)
    rig.add(b"b")
    assert rig.reporter.stats().waiting == 0
    assert not any(thread.name == "umbp-reporter" for thread in threading.enumerate())
    assert rig.client.closed == 1
    rig.reporter.start()
    assert rig.client.started == 1


def test_capacities_are_told_when_they_change(make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPACITY_INTERVAL", 0.01)
    rig = make()
    now = [TierCapacity(DRAM, 100, 50)]
    asked = threading.Semaphore(0)

    def capacities() -> list[TierCapacity]:
        asked.release()
        return list(now)

    rig.reporter.start()
    rig.reporter.watch_capacities(capacities)
    for _ in range(3):
        assert asked.acquire(timeout=LONG)
    assert rig.client.capacities == [(TierCapacity(DRAM, 100, 50),)]
    rig.client.told_capacities.clear()
    now[0] = TierCapacity(DRAM, 100, 10)
    assert rig.client.told_capacities.wait(LONG)
    assert rig.client.capacities[-1] == (TierCapacity(DRAM, 100, 10),)


def test_capacities_that_cannot_be_had_end_nothing(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CAPACITY_INTERVAL", 0.01)
    rig = make()
    asked = threading.Semaphore(0)

    def capacities() -> list[TierCapacity]:
        asked.release()
        raise RuntimeError("no numbers")

    with caplog.at_level(logging.ERROR):
        rig.reporter.start()
        rig.reporter.watch_capacities(capacities)
        for _ in range(3):
            assert asked.acquire(timeout=LONG)
        rig.add(b"a")
        assert rig.reporter.flush(LONG)
    assert rig.client.known == {(DRAM, b"a")}
    assert rig.client.capacities == []
    assert caplog.text.count("the capacities of this node cannot be had") == 1
    assert rig.reporter.stats().failures >= 2


def test_a_master_of_others_is_told_no_capacities(make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPACITY_INTERVAL", 0.01)
    rig = make(native=False)
    asked = threading.Semaphore(0)

    def capacities() -> list[TierCapacity]:
        asked.release()
        return [TierCapacity(DRAM, 100, 50)]

    rig.reporter.watch_capacities(capacities)
    rig.reporter.start()
    for _ in range(3):
        assert asked.acquire(timeout=LONG)
    assert rig.client.capacities == []
    rig.client.native = True
    assert rig.client.told_capacities.wait(LONG), "it is ours now"
    rig.client.told_capacities.clear()
    rig.client.native = False
    assert rig.client.told_capacities.wait(LONG), "and now it is not"
    assert rig.client.capacities == [(TierCapacity(DRAM, 100, 50),), ()]


def test_a_source_that_is_not_understood_is_asked_for_everything_though_nobody_rings(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbp_connectors.reporting.reader.PAUSE_AFTER_A_BUG", 0.05)
    rig = make()
    rig.reporter.start()
    rig.add(b"a")
    assert rig.reporter.flush(LONG)
    rig.feed.tell(1, cast("list[Word]", [None]))
    assert rig.reporter.flush(LONG)
    assert rig.client.known == set()
    rig.client.said.clear()
    pause = threading.Event()
    while not rig.client.said.wait(0.01):
        rig.feed.tell(0, [])
        assert not pause.wait(0.01)
    assert rig.reporter.flush(LONG)
    assert rig.client.known == {(DRAM, b"a")}
    assert rig.reporter.stats().failures == 1


def test_the_meter_gives_what_came_since_it_was_read_last(make: Callable[..., Rig]) -> None:
    rig = make()
    meter = ReportMeter(rig.reporter.stats)
    assert meter.read() == []
    rig.reporter.start()
    rig.add(b"a")
    rig.add(b"b")
    assert rig.reporter.flush(LONG)
    assert _plain(meter.read()) == {("report_hashes", "dram", "came"): 2, ("report_acknowledged_hashes",): 2}
    assert meter.read() == []
    rig.feed.tell_all()
    rig.feed.tell(0, [Word(WordKind.CLEAR, DRAM)])
    assert rig.reporter.flush(LONG)
    news = _plain(meter.read())
    assert news[("report_hashes", "dram", "left")] == 2
    assert news[("report_resyncs",)] == 1


def test_every_metric_is_read_with_its_labels(make: Callable[..., Rig]) -> None:
    rig = make()
    start = rig.reporter.stats()
    ones = dict.fromkeys(("hashes", "heartbeats", "full_syncs", "refused", "failures", "overflows"), 1)
    later = replace(
        start, came={1: 1, 9: 1}, left={3: 1}, overflows=1, resyncs=1, failures=1, client=replace(start.client, **ones)
    )
    shown: list[ReporterStats] = [later]
    readings = ReportMeter(lambda: shown[0]).read()
    assert {reading.metric for reading in readings} == set(REPORT_METRICS)
    assert all(len(reading.labels) == len(reading.metric.labels) for reading in readings)
    plain = _plain(readings)
    assert plain[("report_overflows",)] == 2
    assert plain[("report_hashes", "other", "came")] == plain[("report_hashes", "ssd", "left")] == 1


def _plain(readings: Sequence[Reading]) -> dict[tuple[str, ...], int]:
    return {(reading.metric.name, *reading.labels): reading.amount for reading in readings}
