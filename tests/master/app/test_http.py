"""The HTTP of a master, over real sockets: pages, bounds, and clients that misbehave."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from random import Random

import pytest

from umbp_connectors.master import http
from umbp_connectors.master.http import HttpServer, Page
from umbp_connectors.master.settings import Endpoint
from umbp_core.errors import ConfigError

LOOPBACK = Endpoint("127.0.0.1", 0)
DEADLINE = 60.0


async def hello() -> Page:
    return Page(HTTPStatus.OK, b"hello\n")


async def sad() -> Page:
    return Page(HTTPStatus.SERVICE_UNAVAILABLE, b"sad\n")


def served(scenario: Callable[[Endpoint], Awaitable[None]]) -> None:
    async def whole() -> None:
        server = HttpServer({"/hello": hello, "/sad": sad})
        endpoint = await server.start(LOOPBACK)
        try:
            await asyncio.wait_for(scenario(endpoint), DEADLINE)
        finally:
            await server.stop()
            await server.stop()

    asyncio.run(whole())


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def ask(endpoint: Endpoint, request: bytes) -> bytes:
    """The answer; empty when the connection was closed without one."""
    reader, writer = await asyncio.open_connection(*endpoint)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), DEADLINE)
    except ConnectionError:
        return b""
    finally:
        await leave(writer)


@pytest.mark.parametrize(
    ("request_line", "status", "body"),
    [
        ("GET /hello HTTP/1.1", 200, b"hello\n"),
        ("GET /hello?x=1 HTTP/1.0", 200, b"hello\n"),
        ("HEAD /hello HTTP/1.1", 200, b""),
        ("GET /sad HTTP/1.1", 503, b"sad\n"),
        ("GET / HTTP/1.1", 404, b"there are: /hello /sad\n"),
        ("POST /hello HTTP/1.1", 405, b"Method Not Allowed\n"),
        ("nonsense", 400, b"Bad Request\n"),
        ("GET /hello HTTP/2", 400, b"Bad Request\n"),
        ("GET /hello SSH-2.0", 400, b"Bad Request\n"),
    ],
)
def test_answers(request_line: str, status: int, body: bytes) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        answer = await ask(endpoint, f"{request_line}\r\nHost: x\r\n\r\n".encode())
        head, _, found = answer.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert found == body
        assert b"Connection: close" in head

    served(scenario)


def test_a_head_that_is_too_long_is_refused() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        # Little more than the bound: of what the server leaves unread, a reset would overtake its answer.
        answer = await ask(endpoint, b"GET /hello HTTP/1.1\r\nX: " + b"x" * http.MAX_HEAD)
        assert answer.startswith(b"HTTP/1.1 431 ")
        await ask(endpoint, b"GET /hello HTTP/1.1\r\nX: " + b"x" * (64 * http.MAX_HEAD))
        assert (await ask(endpoint, b"GET /hello HTTP/1.1\r\n\r\n")).endswith(b"hello\n")

    served(scenario)


def test_a_silent_client_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(http, "REQUEST_SECONDS", 0.05)
            reader, writer = await asyncio.open_connection(*endpoint)
            writer.write(b"GET /hel")
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            await leave(writer)
        assert (await ask(endpoint, b"GET /hello HTTP/1.1\r\n\r\n")).endswith(b"hello\n")

    served(scenario)


def test_more_connections_than_the_bound_are_closed_and_the_others_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 3)

    async def scenario(endpoint: Endpoint) -> None:
        idle = [await asyncio.open_connection(*endpoint) for _ in range(3)]
        assert await ask(endpoint, b"") == b""
        for _, writer in idle:
            writer.write(b"GET /hello HTTP/1.1\r\n\r\n")
        for reader, writer in idle:
            assert (await reader.read()).endswith(b"hello\n")
            await leave(writer)
        assert (await ask(endpoint, b"GET /hello HTTP/1.1\r\n\r\n")).endswith(b"hello\n")

    served(scenario)


def test_nonsense_is_answered_or_left_and_never_more_than_that() -> None:
    random = Random(7)

    async def scenario(endpoint: Endpoint) -> None:
        for _ in range(200):
            line = random.choice([b"GET ", b"", b"HEAD /hello ", b"GET /hello HTTP/1.1"]) + random.randbytes(20)
            answer = await ask(endpoint, line + b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 ")
        assert (await ask(endpoint, b"GET /hello HTTP/1.1\r\n\r\n")).endswith(b"hello\n")

    served(scenario)


def test_a_stop_ends_what_is_under_way() -> None:
    async def scenario() -> None:
        server = HttpServer({"/hello": hello})
        reader, writer = await asyncio.open_connection(*await server.start(LOOPBACK))
        writer.write(b"GET /hel")
        await server.stop()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        await leave(writer)

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE))


def test_a_busy_port_is_one_sentence() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            endpoint = Endpoint("127.0.0.1", taken.getsockname()[1])
            with pytest.raises(ConfigError, match=rf"metrics cannot be served at {endpoint}: .*--metrics-listen"):
                await HttpServer({}).start(endpoint)

    asyncio.run(scenario())
