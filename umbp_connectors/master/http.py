"""``/metrics``, ``/healthz`` and ``/readyz``: as much HTTP as a scraper and a container platform need.

One request per connection, bounded in size, time and number.  Nothing here changes anything, and there is no token:
whoever reaches the port may read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import NamedTuple

from umbp_connectors.master.settings import Endpoint
from umbp_core.errors import ConfigError

MAX_HEAD = 8192
MAX_CONNECTIONS = 64
REQUEST_SECONDS = 5.0
ANSWER_SECONDS = 30.0

_TEXT = "text/plain; charset=utf-8"


class Page(NamedTuple):
    """An answer."""

    status: HTTPStatus
    body: bytes
    content_type: str = _TEXT


class HttpServer:
    """Serves pages by path.  ``pages`` are called on the loop, once per request; they must not raise.

    What follows a ``?`` is not looked at.
    """

    def __init__(self, pages: dict[str, Callable[[], Awaitable[Page]]]) -> None:
        self._pages = pages
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, endpoint: Endpoint) -> Endpoint:
        """Listen; returns where, with the port that was chosen for port 0.  ``ConfigError`` when that cannot be."""
        try:
            self._server = await asyncio.start_server(self._accept, endpoint.host, endpoint.port, limit=MAX_HEAD)
        except OSError as error:
            raise ConfigError(
                f"metrics cannot be served at {endpoint}: {error.strerror or error}; is another master running? "
                "Give another address by --metrics-listen, or none"
            ) from error
        return Endpoint(endpoint.host, self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening and end what is under way.  Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(await self._respond(reader))
            await asyncio.wait_for(writer.drain(), ANSWER_SECONDS)
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), ANSWER_SECONDS)
        except (asyncio.IncompleteReadError, asyncio.TimeoutError, OSError):
            pass  # a client that does not say what it wants, or does not take what it asked for
        finally:
            writer.transport.abort()

    async def _respond(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_SECONDS)
        except asyncio.LimitOverrunError:
            return _encoded(_plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))
        method, page = await self._answer(head)
        return _encoded(page, with_body=method != "HEAD")

    async def _answer(self, head: bytes) -> tuple[str, Page]:
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return "", _plain(HTTPStatus.BAD_REQUEST)
        method, path, _ = words
        if method not in ("GET", "HEAD"):
            return method, _plain(HTTPStatus.METHOD_NOT_ALLOWED)
        page = self._pages.get(path.partition("?")[0])
        if page is None:
            return method, Page(HTTPStatus.NOT_FOUND, f"there are: {' '.join(self._pages)}\n".encode())
        return method, await page()


def _plain(status: HTTPStatus) -> Page:
    return Page(status, f"{status.phrase}\n".encode())


def _encoded(page: Page, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {page.status.value} {page.status.phrase}\r\nContent-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + (page.body if with_body else b"")
