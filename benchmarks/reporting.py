"""What it costs an engine to report, and how soon a master knows: producer and reporter in this process, the master in
another, over loopback.

    python benchmarks/reporting.py              # a minute or two
    python benchmarks/reporting.py --quick      # seconds

Hashes have 19 characters, as vLLM's and SGLang's have on the wire.  A step tells two changes: blocks came, and as many
of the oldest left.
"""

from __future__ import annotations

import argparse
import math
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import _report
from master_process import TIMEOUT, hashes, master

from umbp_connectors.config import resolve
from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.words import Word, WordKind

HBM = 1
HELD = 50_000
"""Blocks that the engine holds."""
STEPS = 100
"""Steps per second."""
TARGET_RATE = 200_000
TARGET_STEP_US = 20
TARGET_VISIBLE_MS = 50
Words = list[Word]
_ADD, _REMOVE = WordKind.ADD, WordKind.REMOVE


class Producer:
    """An engine's cache: what comes displaces what is oldest."""

    def __init__(self, reporter: Reporter) -> None:
        self._next = 0
        self.held: deque[bytes] = deque()
        self.feed: Feed[Words] = reporter.feed("hbm", _as_is, self._all)
        self.paid: list[float] = []
        """Seconds that each step spent in ``tell``."""

    def prepare(self, steps: int, blocks: int) -> list[tuple[Words, Words]]:
        """What ``steps`` steps tell, of ``blocks`` blocks each: made before, so that only the telling is measured."""
        prepared = []
        half = blocks // 2
        for _ in range(steps):
            came = hashes(half, self._next)
            self._next += half
            self.held.extend(came)
            left = [self.held.popleft() for _ in range(min(half, max(0, len(self.held) - HELD)))]
            prepared.append(([Word(_ADD, HBM, came)], [Word(_REMOVE, HBM, left)]))
        return prepared

    def tell(self, step: tuple[Words, Words]) -> None:
        """One step."""
        came, left = step
        began = time.perf_counter()
        self.feed.tell(len(came[0].hashes), came)
        self.feed.tell(len(left[0].hashes), left)
        self.paid.append(time.perf_counter() - began)

    def _all(self) -> Words:
        return [Word(WordKind.REPLACE, HBM, list(self.held))]


def _as_is(words: Words) -> Words:
    return words


@contextmanager
def reporting(address: str) -> Iterator[tuple[Reporter, Producer]]:
    """A reporter at default settings, whose producer's first blocks are known."""
    config = resolve({"master_address": address}, {}).config
    reporter = open_reporter(config, NodeFacts("vllm", "none", "0", "both", "127.0.0.1", 8000))
    if reporter is None:
        raise SystemExit("there is a master, and nobody reports to it")
    producer = Producer(reporter)
    reporter.start()
    try:
        for step in producer.prepare(10, 2 * HELD // 10):
            producer.tell(step)
        if not reporter.flush(TIMEOUT):
            raise SystemExit("the master does not answer")
        producer.paid.clear()
        yield reporter, producer
    finally:
        reporter.close()


def paced(producer: Producer, rate: int, seconds: float) -> float:
    """``rate`` blocks a second for so many seconds, in even steps.  Returns when it began."""
    prepared = producer.prepare(round(STEPS * seconds), rate // STEPS)
    pause = threading.Event()
    begin = time.perf_counter()
    for number, step in enumerate(prepared):
        rest = begin + number / STEPS - time.perf_counter()
        if rest > 0:
            pause.wait(rest)
        producer.tell(step)
    return begin


def rates(address: str, seconds: float) -> list[_report.Row]:
    """What a step pays, and what the threads behind it use, at several rates."""
    rows: list[_report.Row] = []
    for rate in (2_000, 20_000, TARGET_RATE):
        with reporting(address) as (reporter, producer):
            before = reporter.stats()
            processor = time.process_time() - time.thread_time()
            began = paced(producer, rate, seconds)
            told = time.perf_counter() - began
            if not reporter.flush(TIMEOUT):
                raise SystemExit("the master does not answer")
            took = time.perf_counter() - began
            used = time.process_time() - time.thread_time() - processor
            stats = reporter.stats()
            paid = [second * 1e6 for second in producer.paid]
            count = stats.client.hashes - before.client.hashes
            rows.append(
                {
                    "blocks/s": rate,
                    "acknowledged/s": round(count / took),
                    "behind at the end ms": (took - told) * 1000,
                    "step pays us, p50": statistics.median(paid),
                    "p99": sorted(paid)[len(paid) * 99 // 100],
                    "overflows": stats.overflows + stats.client.overflows,
                    "threads' processor": f"{used / took:.1%}",
                    "us a block": used / count * 1e6,
                }
            )
    return rows


def most(address: str, blocks: int) -> list[_report.Row]:
    """How many go through when the producer does not wait for anybody but its own bound."""
    with reporting(address) as (reporter, producer):
        prepared = producer.prepare(blocks // 2000, 2000)
        before = reporter.stats()
        began = time.perf_counter()
        for step in prepared:
            while reporter.stats().waiting > 100_000 or reporter.client.stats().waiting > 500_000:
                threading.Event().wait(0.001)
            producer.tell(step)
        if not reporter.flush(TIMEOUT):
            raise SystemExit("the master does not answer")
        took = time.perf_counter() - began
        stats = reporter.stats()
    count = stats.client.hashes - before.client.hashes
    return [{"blocks": blocks, "acknowledged": count, "blocks/s": round(blocks / took), "overflows": stats.overflows}]


def visible(address: str, count: int) -> list[_report.Row]:
    """From ``tell`` until a match finds it, without other load and beside it."""
    rows: list[_report.Row] = []
    for rate in (0, 20_000):
        with reporting(address) as (reporter, producer):
            ended = threading.Event()
            load = threading.Thread(target=_load, args=(producer, rate, ended))
            probe: Feed[Words] = reporter.feed("probe", _as_is, list)
            load.start()
            took = []
            for number in range(count):
                threading.Event().wait(0.003 + 0.017 * math.modf(number * 0.618)[0])
                key = b"probe-%d" % number
                began = time.perf_counter()
                probe.tell(1, [Word(_ADD, HBM, [key])])
                while not reporter.client.match([key], timeout=TIMEOUT):
                    continue
                took.append((time.perf_counter() - began) * 1000)
            ended.set()
            load.join()
        took.sort()
        rows.append(
            {
                "other blocks/s": rate,
                "p50 ms": took[count // 2],
                "p90 ms": took[count * 9 // 10],
                "p99 ms": took[count * 99 // 100],
                "most ms": took[-1],
            }
        )
    return rows


def _load(producer: Producer, rate: int, ended: threading.Event) -> None:
    while rate and not ended.is_set():
        paced(producer, rate, 0.2)


def scheduler(address: str, seconds: float, count: int) -> list[_report.Row]:
    """How much longer a thread takes that is busy with Python all the time: what the GIL costs.

    The quietest of ``count`` rounds, in which all rates have their turns.
    """
    rates = (0, 2_000, 20_000, TARGET_RATE)
    ways = {str(rate): partial(_busy, address, rate // STEPS, seconds / count) for rate in rates}
    figures = {name: min(means) for name, means in _report.rounds(ways, count).items()}
    alone = figures["0"]
    return [
        {
            "blocks a step": rate // STEPS,
            "step ms, mean": figures[str(rate)],
            "blocks/s": round(rate // STEPS / figures[str(rate)] * 1000),
            "longer by ms": figures[str(rate)] - alone,
            "longer by": f"{figures[str(rate)] / alone - 1:.1%}",
        }
        for rate in rates
    ]


def _busy(address: str, blocks: int, seconds: float) -> float:
    """The mean milliseconds of a step that tells ``blocks`` blocks."""
    with reporting(address) as (_, producer):
        steps = round(STEPS * seconds)
        prepared = producer.prepare(steps, blocks) if blocks else []
        began = time.perf_counter()
        for number in range(steps):
            if prepared:
                producer.tell(prepared[number])
            _work(300_000)
        return (time.perf_counter() - began) / steps * 1000


def _work(count: int) -> int:
    """About ten milliseconds of pure Python."""
    total = 0
    for number in range(count):
        total += number & 7
    return total


class Meter:
    """Carries bytes between a client and the master, and counts what goes to the master."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self.sent = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Where to connect."""
        return int(self._server.getsockname()[1])

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._server.accept()
            except OSError:
                return
            there = socket.create_connection(self._target)
            threading.Thread(target=self._carry, args=(here, there, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(there, here, False), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1 << 18):
                self.sent += len(data) * counted
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


def wire(doors: dict[str, tuple[str, int]], seconds: float) -> list[_report.Row]:
    """Bytes that go to the master per block, by wire and by how many blocks go at once."""
    rows: list[_report.Row] = []
    for scheme, door in doors.items():
        row: _report.Row = {"wire": scheme}
        for rate in (200, 2_000, 20_000):
            meter = Meter(door)
            with reporting(f"{scheme}://127.0.0.1:{meter.port}") as (reporter, producer):
                sent, count = meter.sent, reporter.stats().client.hashes
                paced(producer, rate, seconds)
                reporter.flush(TIMEOUT)
                row[f"{rate} blocks/s"] = (meter.sent - sent) / (reporter.stats().client.hashes - count)
            meter.close()
        rows.append(row)
    return rows


def verdicts(sections: dict[str, list[_report.Row]]) -> list[_report.Row]:
    """The targets beside what was measured."""
    fast = sections["Rates"][-1]
    seen = [float(str(row["p50 ms"])) for row in sections["From event to visibility"]]
    return [
        {
            "target": f"{TARGET_RATE} blocks/s through one reporter",
            "measured": fast["acknowledged/s"],
            "met": float(str(fast["acknowledged/s"])) >= 0.95 * TARGET_RATE and not fast["overflows"],
        },
        {
            "target": f"a step pays at most {TARGET_STEP_US} us (p50, at that rate)",
            "measured": fast["step pays us, p50"],
            "met": float(str(fast["step pays us, p50"])) <= TARGET_STEP_US,
        },
        {
            "target": f"visible after at most {TARGET_VISIBLE_MS} ms (p50)",
            "measured": max(seen),
            "met": max(seen) <= TARGET_VISIBLE_MS,
        },
    ]


NOTES: Sequence[str] = (
    "The producer's bookkeeping is not in what a step pays: only its two calls of `tell`.",
    "`threads' processor` is what the reporter's and the client's thread used together, of one core.",
    "Most of that they hold the GIL: what it costs a thread that never waits is the table of the busy scheduler.",
    "Of the busy scheduler's steps, which are pure Python, the quietest of five rounds counts.",
    "While others want the cores, a thread that holds the GIL waits for one: that table then says more about them.",
    "A block counts when it comes and when it leaves.",
    "Bytes on the wire are those towards the master, heartbeats included.",
    "Default settings: `report_interval_ms` 20. The master runs on the same machine.",
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    parser.add_argument("--out", type=Path, default=_report.OUT, help="folder for reporting.json and reporting.md")
    options = parser.parse_args()
    seconds = 0.5 if options.quick else 4.0
    sections: dict[str, list[_report.Row]] = {}
    with master() as running:
        address = f"umbp://{running.tcp[0]}:{running.tcp[1]}"
        host, _, port = running.grpc.rpartition(":")
        sections["Rates"] = rates(address, seconds)
        sections["As fast as it goes"] = most(address, 200_000 if options.quick else 2_000_000)
        sections["From event to visibility"] = visible(address, 30 if options.quick else 300)
        sections["A scheduler that is busy all the time"] = scheduler(address, 2 * seconds, 2 if options.quick else 5)
        sections["Bytes per block on the wire"] = wire({"umbp": running.tcp, "grpc": (host, int(port))}, seconds)
    sections = {"Targets": verdicts(sections), **sections}
    print(_report.write("reporting", "Reporting to a master", sections, NOTES, options.out))


if __name__ == "__main__":
    main()
