"""What nodes tell: reports, what they cost in memory, and what a router notices of them and of large revokes."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple

import _report
from master_process import BATCH, TIMEOUT, Master, hashes, master, register, report

HBM, DRAM = 1, 2
CPP_REPORT = {1: 0.0167, 16: 0.176, 128: 0.511, 2048: 0.709, 16384: 0.726}
GRPCIO_REPORT = {1: "0.0034 - 0.0048", 16: "0.051 - 0.056", 128: "0.194 - 0.209", 2048: "0.366 - 0.523"} | {
    16384: "0.488 - 0.553"
}
"""Million blocks a second of one client of the original."""
NODES = 4
WATCHED = 1.0
"""Seconds for which matches are looked at after a call began: longer than a master cleans up for."""


class Call(NamedTuple):
    """A match: when it began, and what it took; seconds."""

    begun: float
    took: float


def reports(command: Sequence[str], total: int) -> list[_report.Row]:
    """Million blocks a second of one client, per size of a report; a new master for every round."""
    figures: dict[int, dict[str, list[float]]] = {size: {} for size in CPP_REPORT}
    for _ in range(3):
        for door in ("native", "native, TCP", "gRPC"):
            with master(command) as running:
                doors = running.doors()
                client = doors[door]
                for size in CPP_REPORT:
                    register(client, f"node-{size}")
                    # Small batches take long: fewer blocks are enough.
                    blocks = min(total, size * 2000)
                    rate = report(client, f"node-{size}", hashes(blocks, size * 10**9), HBM, size) / 1e6
                    figures[size].setdefault(door, []).append(rate)
                for each in doors.values():
                    each.close()
    return [
        {"blocks a call": size}
        | {door: max(rates) for door, rates in figures[size].items()}
        | {"original, C++ client": CPP_REPORT[size], "original, grpcio": GRPCIO_REPORT[size]}
        for size in CPP_REPORT
    ]


def million(running: Master, total: int) -> tuple[list[list[bytes]], list[_report.Row]]:
    """Fill a new master with ``total`` hashes on four nodes; returns what each holds, and the memory of the master."""
    client = running.native()
    share = total // NODES
    held = [hashes(share, number * share) for number in range(NODES)]
    register(client, *(f"node-{number}" for number in range(NODES)))
    rows: list[_report.Row] = []
    before = running.resident()
    for tier, name, original, target in ((HBM, "one tier", 404, 200), (DRAM, "a second tier more", 47, "-")):
        for number, keys in enumerate(held):
            report(client, f"node-{number}", keys, tier)
        after = running.resident()
        rows.append(
            {
                "hashes": total,
                "on": name,
                "resident bytes a hash": (after - before) / total,
                "original": original,
                "target": target,
            }
        )
        before = after
    for number in range(NODES):
        client.clear_tier(f"node-{number}", DRAM, TIMEOUT)
    client.close()
    return held, rows


@contextmanager
def watched(running: Master, asked: Sequence[Sequence[bytes]]) -> Iterator[Connection]:
    """Matches one after the other, in a process of their own; ask the connection for those since the last time."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_watch, args=(running, asked, its))
    process.start()
    if not mine.poll(TIMEOUT):
        raise SystemExit("the process that asks for matches does not start")
    mine.recv()
    try:
        yield mine
    finally:
        mine.send(False)
        process.join(TIMEOUT)


def _watch(running: Master, asked: Sequence[Sequence[bytes]], pipe: Connection) -> None:
    client = running.native()
    choice = random.Random(5)
    calls: list[Call] = []
    pipe.send(True)
    while True:
        keys = asked[choice.randrange(len(asked))]
        begun = time.perf_counter()
        client.match(keys, False, TIMEOUT)
        calls.append(Call(begun, time.perf_counter() - begun))
        if pipe.poll():
            if not pipe.recv():
                break
            pipe.send(calls)
            calls = []
    client.close()


def _calls(pipe: Connection) -> list[Call]:
    pipe.send(True)
    calls: list[Call] = pipe.recv()
    return calls


def stalls(running: Master, held: Sequence[Sequence[bytes]]) -> list[_report.Row]:
    """The longest match of 128 hashes while a quarter of the index is revoked at once."""
    doors = running.doors()
    native, gone = doors["native"], held[1]
    asked = [list(held[0][start : start + 128]) for start in range(0, len(held[0]) - 128, 128)]
    works: dict[str, tuple[Callable[[], object], str]] = {
        "nothing else happens": (lambda: None, "-"),
        "one tier of a node that does not exist": (lambda: native.clear_tier("ghost", HBM, TIMEOUT), "537 - 1289"),
        "one tier of a node": (lambda: native.clear_tier("node-1", HBM, TIMEOUT), "601 - 901"),
        "one tier of a node, gRPC": (lambda: doors["gRPC"].clear_tier("node-1", HBM, TIMEOUT), "601 - 901"),
        "a node": (lambda: native.clear_node("node-1", TIMEOUT), "631 - 918"),
        "a node goes": (lambda: native.unregister("node-1", TIMEOUT), "410 - 831"),
        "all hashes of a node by name, one call": (lambda: native.revoke("node-1", gone, HBM, TIMEOUT), "-"),
        "all hashes of a node by name, gRPC": (lambda: doors["gRPC"].revoke("node-1", gone, HBM, TIMEOUT), "-"),
    }
    rows: list[_report.Row] = []
    with watched(running, asked) as pipe:
        for name, (work, original) in works.items():
            worst, middle, took = [], [], []
            for _ in range(3):
                _calls(pipe)
                begun = time.perf_counter()
                work()
                took.append(time.perf_counter() - begun)
                # The master cleans up after its answer.
                threading.Event().wait(max(0.0, WATCHED - took[-1]))
                times: list[float] = []
                while not times:  # whoever asks may have had no turn yet
                    times = [call.took for call in _calls(pipe) if call.begun + call.took > begun]
                worst.append(max(times))
                middle.append(statistics.median(times))
                if name == "a node goes":
                    register(native, "node-1")
                report(native, "node-1", gone, HBM)
            rows.append(
                {
                    "revoked": name,
                    "call ms": min(took) * 1e3,
                    "longest match ms, best of 3": min(worst) * 1e3,
                    "worst of 3": max(worst) * 1e3,
                    "median match us": min(middle) * 1e6,
                    "original ms": original,
                }
            )
    for client in doors.values():
        client.close()
    return rows


def mixed(running: Master, held: Sequence[Sequence[bytes]], total: int) -> list[_report.Row]:
    """Matches of 128 hashes in a large index, and while one node reports at full speed."""
    native = running.native()
    asked = [list(held[0][start : start + 128]) for start in range(0, len(held[0]) - 128, 128)]
    rows: list[_report.Row] = []
    with watched(running, asked) as pipe:

        def row(name: str, work: Callable[[], object], original: str) -> None:
            rounds = []
            for _ in range(3):
                _calls(pipe)
                work()
                times = sorted(call.took for call in _calls(pipe))
                rounds.append((times[len(times) // 2], times[len(times) * 99 // 100], times[-1]))
            p50, p99, longest = min(rounds)
            rows.append(
                {
                    "meanwhile": name,
                    "match p50 us": p50 * 1e6,
                    "p99 us": p99 * 1e6,
                    "longest ms": longest * 1e3,
                    "original us": original,
                }
            )

        row("nothing", lambda: threading.Event().wait(WATCHED), "p50 229 - 244")
        new = [hashes(total // 3, 10**12 * number) for number in (1, 2, 3)]
        row(f"reports of {BATCH} blocks", lambda: report(native, "node-3", new.pop(), HBM), "p50 299 - 368, p99 4100")
    native.close()
    return rows
