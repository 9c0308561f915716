"""What a call costs that does nothing, with the same libraries on the same machine: nobody can be below that."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import _report
import grpc
import grpc.aio
import uvloop
from master_process import TIMEOUT

_METHOD = "/floor/Echo"


class _Echo(asyncio.Protocol):
    """Sends back what it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write = transport.write  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._write(data)


def _serve(path: str, pipe: Connection) -> None:
    loop = uvloop.new_event_loop()
    loop.run_until_complete(_until_told(path, pipe))
    loop.close()


async def _until_told(path: str, pipe: Connection) -> None:
    loop = asyncio.get_running_loop()

    async def echo(request: bytes, _: object) -> bytes:
        return request

    handler = grpc.method_handlers_generic_handler("floor", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    listener = await loop.create_unix_server(_Echo, path)
    told = loop.create_future()
    loop.add_reader(pipe.fileno(), lambda: told.done() or told.set_result(None))
    pipe.send(port)
    await told
    listener.close()
    await server.stop(None)


class Echoes(NamedTuple):
    """A process that sends back what it gets."""

    pid: int
    path: str
    """Of its Unix socket."""
    port: int
    """Of its gRPC."""


@contextmanager
def echoes() -> Iterator[Echoes]:
    """Start the process, and stop it in the end."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "echo.sock")
        process = context.Process(target=_serve, args=(path, its))
        process.start()
        try:
            if not mine.poll(TIMEOUT):
                raise SystemExit("the process that answers with nothing does not start")
            yield Echoes(process.pid or 0, path, mine.recv())
        finally:
            mine.send(True)
            process.join(TIMEOUT)


@contextmanager
def unix_call(path: str) -> Iterator[Callable[[], object]]:
    """What sends 64 bytes to the socket at ``path`` and waits for them."""
    frame = bytes(64)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)

        def call() -> None:
            sock.sendall(frame)
            sock.recv(1 << 16)

        yield call


def floors(count: int) -> list[_report.Row]:
    """Median of an empty call through each way; best of three rounds."""
    with echoes() as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary(_METHOD)
        call(b"", wait_for_ready=True, timeout=TIMEOUT)
        with unix_call(server.path) as unix:
            return [
                {
                    "empty call": "64 bytes and back, Unix socket, uvloop and a blocking socket",
                    "p50 us": median(unix, count),
                },
                {
                    "empty call": "gRPC, raw bytes, grpc.aio server and a blocking client",
                    "p50 us": median(lambda: call(b"", timeout=TIMEOUT), count),
                },
            ]


def median(work: Callable[[], object], count: int) -> float:
    """Microseconds of ``work``; the best of three rounds."""
    rounds = []
    for _ in range(3):
        times = []
        for _ in range(count):
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e6)
        rounds.append(statistics.median(times))
    return min(rounds)
