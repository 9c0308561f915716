"""What a call costs that does nothing, with the same libraries on the same machine: nobody can be below that."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

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


def floors(count: int) -> list[_report.Row]:
    """Median of an empty call through each way; best of three rounds."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "echo.sock")
        process = context.Process(target=_serve, args=(path, its))
        process.start()
        if not mine.poll(TIMEOUT):
            raise SystemExit("the process that answers with nothing does not start")
        with grpc.insecure_channel(f"127.0.0.1:{mine.recv()}") as channel, socket.socket(socket.AF_UNIX) as sock:
            call = channel.unary_unary(_METHOD)
            call(b"", wait_for_ready=True, timeout=TIMEOUT)
            sock.connect(path)
            frame = bytes(64)

            def unix() -> None:
                sock.sendall(frame)
                sock.recv(1 << 16)

            rows: list[_report.Row] = [
                {
                    "empty call": "64 bytes and back, Unix socket, uvloop and a blocking socket",
                    "p50 us": _median(unix, count),
                },
                {
                    "empty call": "gRPC, raw bytes, grpc.aio server and a blocking client",
                    "p50 us": _median(lambda: call(b"", timeout=TIMEOUT), count),
                },
            ]
        mine.send(True)
        process.join(TIMEOUT)
    return rows


def _median(work: Callable[[], object], count: int) -> float:
    rounds = []
    for _ in range(3):
        times = []
        for _ in range(count):
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e6)
        rounds.append(statistics.median(times))
    return min(rounds)
