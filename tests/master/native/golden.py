"""A conversation of every message with a fresh master; its frames are written down in ``tests/core/wire/golden``.

``python -m tests.master.native.golden`` (with the packages on the path) writes the files anew: only when the protocol
was really meant to change.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.master.native.harness import DRAM, HBM, SSD, Master, RawClient, master
from umbp_connectors.master.native_connection import NativeConnection
from umbp_connectors.master.native_server import NativeServer
from umbp_core.wire import messages as m
from umbp_core.wire.codec import encode
from umbp_core.wire.columns import pack_column
from umbp_core.wire.frames import FrameType, encode_frame
from umbp_core.wire.hashes import EMPTY, pack_hashes

FOLDER = Path(__file__).resolve().parents[2] / "core" / "wire" / "golden"
SESSION = 0x0102030405060708
HASHES = [b"7", b"42", b"1234567890123456789"]
BINARY = [bytes([0, number]) * 4 for number in (1, 2, 3)]


@dataclass(frozen=True)
class Step:
    """One exchange: a frame, which one comes back to."""

    name: str
    frame: bytes


def steps() -> Iterator[Step]:
    """The conversation."""
    yield Step("hello", encode_frame(FrameType.HELLO, 0, 0, encode(m.Hello(1, "router", "", b"secret"))))
    for sequence, (name, message) in enumerate(requests(), 1):
        yield Step(name, encode_frame(FrameType.REQUEST, SESSION, sequence, encode(message)))
    count = sequence
    yield Step("watch", encode_frame(FrameType.REQUEST, SESSION, count + 1, encode(m.Watch(1, 5))))
    yield Step("cancel", encode_frame(FrameType.CANCEL, SESSION, count + 1))
    yield Step("error-unknown-message", encode_frame(FrameType.REQUEST, SESSION, count + 2, b"\x91\x63"))
    yield Step("error-malformed", encode_frame(FrameType.REQUEST, SESSION, count + 3, b"\x92\x15\xa4text"))
    yield Step("error-invalid", encode_frame(FrameType.REQUEST, SESSION, count + 4, encode(m.ClearNode(""))))
    newer = bytearray(encode_frame(FrameType.REQUEST, SESSION, count + 5))
    newer[4] = 2
    yield Step("error-version", bytes(newer))


def requests() -> Iterator[tuple[str, m.Message]]:
    """One of each, and the packing modes of lists."""
    node = "node-a"
    yield "register", m.Register(node, "10.0.0.1", "10.0.0.1:9000", b"\0desc", ((DRAM, 1000, 900),), ("rank=0",), 5)
    yield "report-separated", m.Report(node, DRAM, pack_hashes(HASHES))
    yield "report-fixed", m.Report(node, SSD, pack_hashes(BINARY))
    yield "report-lengths", m.Report(node, HBM, pack_hashes([b"\0", *HASHES[:1]]))
    yield "match", m.Match(pack_hashes([*HASHES, b"unknown"]), True)
    yield "match-nothing", m.Match(EMPTY)
    yield "hit-counts", m.HitCounts(pack_hashes([b"unknown", *HASHES]))
    yield "match-prefix", m.MatchPrefix(pack_hashes(HASHES))
    yield "match-prefix-weights", m.MatchPrefix(pack_hashes(HASHES), {HBM: 0.5, DRAM: 1.5}, 1)
    row = m.BundleRow(
        1, b"\0\0\1", pack_column("i", [DRAM, SSD, DRAM]), pack_column("Q", [4096, 8192, 0]), pack_hashes(
            [b"block-1", b"block-2", b"block-3"]
        )
    )  # fmt: skip
    yield "heartbeat", m.ReportHeartbeat(node, (row,), False, 0, ((DRAM, 1000, 800),), {DRAM: 1, SSD: 1}, 5)
    yield "keepalive", m.ReportHeartbeat(node)
    yield "route-put", m.RoutePut("", pack_hashes([b"block-1", b"block-9"]), pack_column("Q", [100, 200]))
    yield "route-get", m.RouteGet("", pack_hashes([b"block-1", b"block-9", b"block-2"]), ("node-b",))
    yield "lookup", m.Lookup(pack_hashes([b"block-1", b"block-9", b"block-2"]))
    yield "list-nodes", m.ListNodes()
    yield "list-blocks", m.ListBlocks(node, DRAM, 0, 2)
    yield "explain", m.Explain(node, HASHES[0])
    samples = (
        m.SampleRow("requests", m.CounterRow(2.0), "how many", (("rank", "0"),)),
        m.SampleRow("room", m.GaugeRow(0.5)),
        m.SampleRow("seconds", m.HistogramRow(pack_column("d", [0.1, 1.0]), pack_column("Q", [3, 4]), 5, 6.5)),
    )
    yield "report-metrics", m.ReportMetrics(node, samples)
    actions = (
        m.ActionRow(1, DRAM, pack_hashes(HASHES[:2])),
        m.ActionRow(2, DRAM, pack_hashes(HASHES[:1])),
        m.ActionRow(3, HBM, EMPTY),
    )
    yield "apply-batch", m.ApplyBatch(node, 5, 1, actions, True)
    yield "apply-batch-again", m.ApplyBatch(node, 5, 1, actions, True)
    yield "probe", m.Probe(node, 5, 2)
    yield "revoke", m.Revoke(node, DRAM, pack_hashes(HASHES))
    yield "clear-tier", m.ClearTier(node, DRAM)
    yield "clear-node", m.ClearNode(node)
    yield "unregister", m.Unregister(node)


class FixedServer(NativeServer):
    """Gives every connection the same session."""

    def opened(self, connection: NativeConnection) -> int:
        """See ``NativeServer``."""
        return SESSION if super().opened(connection) else 0


@contextmanager
def fresh_door(running: Master, path: Path) -> Iterator[str]:
    """A door whose every byte is known beforehand."""

    async def listen() -> FixedServer:
        server = FixedServer(running.service, running.observer, token=b"secret")
        server.name = "example"
        running.servers.append(server)
        await server.listen_unix(path)
        return server

    running.run(listen())
    yield str(path)


def file_of(number: int, step: Step) -> Path:
    """Where an exchange is written down."""
    return FOLDER / f"{number:02}-{step.name}.hex"


def lines_of(mark: str, frame: bytes) -> list[str]:
    """A frame in text: the header on a line, then the payload in lines of 32 bytes."""
    parts = [frame[:40], *(frame[at : at + 32] for at in range(40, len(frame), 32))]
    return [f"{mark} {part.hex(' ')}" for part in parts]


def frames_in(text: str, mark: str) -> list[bytes]:
    """The frames of one side; each begins with the magic."""
    data = b"".join(bytes.fromhex(line[2:]) for line in text.splitlines() if line.startswith(mark))
    frames, at = [], 0
    while at < len(data):
        end = at + 40 + int.from_bytes(data[at + 32 : at + 36], "little")
        frames.append(data[at:end])
        at = end
    return frames


def record(folder: Path = FOLDER) -> None:
    """Have the conversation, and write it down."""
    folder.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as place,
        master(asyncio.new_event_loop()) as running,
        fresh_door(running, Path(place) / "door") as path,
        RawClient(path) as raw,
    ):
        for number, step in enumerate(steps(), 1):
            raw.send(step.frame)
            lines = lines_of(">", step.frame) + lines_of("<", raw.receive_bytes())
            file_of(number, step).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    record()
