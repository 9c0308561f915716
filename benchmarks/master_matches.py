"""What a router asks: matches one at a time and pipelined, chains on many nodes, prefixes."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import _report
from master_process import BATCH, TIMEOUT, Master, hashes, register, report

from umbp_connectors.client.native_session import Identity, NativeSession
from umbp_core.master.transport import MasterTransport
from umbp_core.wire import messages
from umbp_core.wire.codec import encode
from umbp_core.wire.frames import FrameType, encode_frame
from umbp_core.wire.hashes import pack_hashes

HBM, DRAM = 1, 2
NODES = 8
CPP_MATCH = {1: (46, 47, 42), 128: (111, 122, 66), 2048: (1342, 1550, 527)}
GRPCIO_MATCH = {1: (116, 117, 110), 128: (258, 279, 147), 2048: (1381, 1516, 567)}
CPP_P99 = {1: 154, 128: 717, 2048: 1796}
"""Of the hits; microseconds, as all of these: of the original's client in C++ and of Python's grpcio."""
KINDS = ("hit", "hit, counted", "miss")
WINDOW = 64
"""Requests that a pipelined client sends at once; as many may still be unanswered."""

Query = Callable[[], list[bytes]]


class Times(NamedTuple):
    """Microseconds of one call."""

    p50: float
    p99: float


def timed(work: Callable[[list[bytes]], object], query: Query, count: int) -> Times:
    """Of ``count`` calls, each with a query of its own."""
    times = []
    for _ in range(count):
        keys = query()
        start = time.perf_counter()
        work(keys)
        times.append((time.perf_counter() - start) * 1e6)
    times.sort()
    return Times(times[count // 2], times[count * 99 // 100])


def best(rounds: Sequence[Times]) -> Times:
    """The round with the lowest median, as the original's figures are the best of three."""
    return min(rounds)


def in_turns(works: dict[str, Callable[[list[bytes]], object]], query: Query, count: int) -> dict[str, Times]:
    """The best of three rounds of each of ``works``; in turns, so that a noisy neighbour hits all of them."""
    for work in works.values():
        timed(work, query, max(2, count // 10))
    rounds = [{name: timed(work, query, count) for name, work in works.items()} for _ in range(3)]
    return {name: best([turn[name] for turn in rounds]) for name in works}


def load(master: Master, total: int) -> list[list[bytes]]:
    """``total`` hashes over eight nodes; returns what each holds."""
    client = master.native()
    share = total // NODES
    held = [hashes(share, node * share) for node in range(NODES)]
    for node, keys in enumerate(held):
        register(client, f"node-{node}")
        report(client, f"node-{node}", keys, HBM)
    client.close()
    return held


def match(master: Master, held: Sequence[Sequence[bytes]], count: int) -> list[_report.Row]:
    """Match of hashes of which one node holds all, or nobody any."""
    choice = random.Random(1)
    doors = master.doors()
    rows: list[_report.Row] = []
    for length in CPP_MATCH:

        def hit(length: int = length) -> list[bytes]:
            keys = held[choice.randrange(NODES)]
            start = choice.randrange(len(keys) - length)
            return list(keys[start : start + length])

        # Made before: while one is made, a machine with nothing else to do goes to sleep, and waking it would count.
        strange = [[b"-%018d" % choice.randrange(10**17) for _ in range(length)] for _ in range(100)]

        def miss(strange: list[list[bytes]] = strange) -> list[bytes]:
            return list(choice.choice(strange))

        for number, kind in enumerate(KINDS):
            works = {name: _matching(client, kind == "hit, counted") for name, client in doors.items()}
            found = in_turns(works, miss if kind == "miss" else hit, count // 4 if length == BATCH else count)
            row: _report.Row = {"hashes": length, "kind": kind}
            for name, times in found.items():
                row |= {f"{name}: p50 us": times.p50, f"{name}: p99 us": times.p99}
            row |= {
                "original, C++ client": CPP_MATCH[length][number],
                "its p99": CPP_P99[length] if not number else "-",
            }
            rows.append(row | {"original, grpcio": GRPCIO_MATCH[length][number]})
    for client in doors.values():
        client.close()
    return rows


def _matching(client: MasterTransport, counted: bool) -> Callable[[list[bytes]], object]:
    return lambda keys: client.match(keys, counted, TIMEOUT)


def spread(master: Master, count: int) -> list[_report.Row]:
    """2048 and 128 hashes that 8 nodes hold on 2 tiers, in three shapes."""
    choice = random.Random(2)
    doors = master.doors()
    shapes: dict[str, Callable[[list[bytes]], list[bytes]]] = {
        "all of them everywhere": lambda keys: keys,
        "prefixes of different lengths": lambda keys: keys[: choice.randrange(len(keys) // 2, len(keys))],
        "nine of ten, at random": lambda keys: choice.sample(keys, len(keys) * 9 // 10),
    }
    rows: list[_report.Row] = []
    for number, (name, shape) in enumerate(shapes.items()):
        keys = hashes(BATCH, 10**9 * (1 + number))
        for node in range(NODES):
            for tier in (HBM, DRAM):
                report(doors["native"], f"node-{node}", shape(keys), tier)
        for length, original in ((BATCH, "9500 - 15200"), (128, "700 - 710")):
            works = {door: _matching(client, False) for door, client in doors.items()}
            found = in_turns(works, lambda length=length, keys=keys: keys[:length], count)
            row: _report.Row = {"hashes": length, "held": name}
            row |= {f"{door}: p50 us": times.p50 for door, times in found.items()}
            rows.append(row | {"original, C++ client": original})
    for client in doors.values():
        client.close()
    return rows


def prefix(master: Master, count: int) -> list[_report.Row]:
    """``match_prefix`` of 2048 hashes on 64 nodes, each of which holds them on two tiers."""
    choice = random.Random(3)
    clients = {"native": master.native(), "native, TCP": master.native(master.tcp)}
    nodes = [f"prefix-{number}" for number in range(64)]
    register(clients["native"], *nodes)
    shapes: dict[str, Callable[[list[bytes]], list[bytes]]] = {
        "every node a prefix of its own length": lambda keys: keys[: choice.randrange(1, len(keys))],
        "all of them everywhere": lambda keys: keys,
        "nine of ten, at random": lambda keys: choice.sample(keys, len(keys) * 9 // 10),
    }
    rows: list[_report.Row] = []
    for number, (name, shape) in enumerate(shapes.items()):
        keys = hashes(BATCH, 10**9 * (11 + number))
        for node in nodes:
            held = shape(keys)
            for tier in (HBM, DRAM):
                report(clients["native"], node, held, tier)
        row: _report.Row = {"hashes": BATCH, "nodes": len(nodes), "held": name}
        for weights, suffix in ((None, ""), ({HBM: 0.0, DRAM: 1.0}, ", weighted")):
            works: dict[str, Callable[[list[bytes]], object]] = {
                door: lambda asked, client=client, weights=weights: client.match_prefix(asked, weights, TIMEOUT)
                for door, client in clients.items()
            }
            found = in_turns(works, lambda keys=keys: list(keys), count)
            row |= {f"{door}{suffix}: p50 us": times.p50 for door, times in found.items()}
        rows.append(row | {"original": "has none"})
    for client in clients.values():
        client.close()
    return rows


def pipelined(master: Master, held: Sequence[Sequence[bytes]], seconds: float) -> list[_report.Row]:
    """Matches a second that one connection over the Unix socket gets answered when it does not wait for each."""
    choice = random.Random(4)
    rows: list[_report.Row] = []
    for length in (1, 128, BATCH):
        payloads = []
        for _ in range(4000 if length < BATCH else 500):
            keys = held[choice.randrange(NODES)]
            start = choice.randrange(len(keys) - length)
            payloads.append(encode(messages.Match(pack_hashes(keys[start : start + length]), False)))
        rates, busy = [], []
        for _ in range(3):
            before, begun = master.processor(), time.perf_counter()
            rates.append(_pump(master.unix, payloads, seconds))
            busy.append((master.processor() - before) / (time.perf_counter() - begun))
        rows.append(
            {
                "hashes": length,
                "matches/s": max(rates),
                "hashes/s, million": max(rates) * length / 1e6,
                "master's processor busy": f"{max(busy):.0%}",
                "original, C++ client": {1: "6300 - 12000", 128: "3600", BATCH: "431 - 493"}[length],
            }
        )
    return rows


def _pump(address: str, payloads: Sequence[bytes], seconds: float) -> float:
    """Send requests that were encoded before, and count answers; a second."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        session = NativeSession(Identity(role="benchmark"))
        sock.sendall(session.hello())
        while not session.greeted(sock.recv(1 << 16)):
            pass
        number, splitter = session.splitter.session, session.splitter
        sent = answered = 0
        window = max(2, WINDOW * 128 * 20 // max(128 * 20, len(payloads[0])))
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            fresh = range(sent, sent + window)
            frames = [encode_frame(FrameType.REQUEST, number, n + 1, payloads[n % len(payloads)]) for n in fresh]
            sock.sendall(b"".join(frames))
            sent += window
            while sent - answered > window:
                answered += len(splitter.feed(sock.recv(1 << 20)))
                if splitter.error is not None:
                    raise splitter.error
        return answered / (time.perf_counter() - start)
