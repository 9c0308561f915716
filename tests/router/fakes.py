"""Workers that answer like an engine's server, and nodes of a real master that say what they hold."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from umbp_connectors.client.master_client import MasterClient
from umbp_connectors.prompt_hashes.hasher import NO_NAMESPACE, Namespace
from umbp_connectors.prompt_hashes.tags import hasher_of
from umbp_core.master.model import Registration

MODEL = "m"
BLOCK = 4
TAGS = {"block": str(BLOCK), "hash": "sha256", "hash_form": "int64", "hash_start": "default", "version": "0.32.0"}
DEADLINE = 60.0


@dataclass
class FakeWorker:
    """Serves on a free port while its context is open.  Its tokenizer makes one token of each character."""

    name: str
    tags: dict[str, str] = field(default_factory=lambda: dict(TAGS))
    status: int = 200
    pieces: Sequence[bytes] = (b"data: one\n\n", b"data: two\n\n")
    tokenizes: bool = True
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    tokenized: list[dict[str, Any]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    """Before the first piece of an answer, if set."""
    later: asyncio.Event | None = None
    """Before each further piece, if set."""
    breaks: bool = False
    """Whether an answer breaks off after its pieces."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether a client left before its answer ended."""
    models: Sequence[dict[str, Any]] = ({"id": MODEL},)
    metrics: str = ""
    key: str = ""
    url: str = ""
    runner: web.AppRunner | None = None

    async def open(self, port: int = 0) -> None:
        app = web.Application()
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._complete)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/health", self._healthy)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        self.runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def close(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    async def __aenter__(self) -> FakeWorker:
        await self.open()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.headers.append(dict(request.headers))
        response = web.StreamResponse(
            status=self.status, headers={"Content-Type": "text/event-stream", "X-Engine": "e"}
        )
        try:
            if self.gate is not None:
                await self.gate.wait()
            await response.prepare(request)
            for number, piece in enumerate(self.pieces):
                if number and self.later is not None:
                    await self.later.wait()
                await response.write(piece)
            if self.breaks and request.transport is not None:
                request.transport.abort()
        except asyncio.CancelledError:
            self.left.set()
            raise
        return response

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.tokenized.append(body)
        if not self.tokenizes:
            return web.Response(status=500)
        text = body["prompt"] if "prompt" in body else "".join(message["content"] for message in body["messages"])
        return web.json_response({"tokens": [ord(character) for character in text]})

    async def _healthy(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics)

    async def _models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        return web.json_response({"data": list(self.models)})


async def until(true: Callable[[], bool]) -> None:
    """Wait for what another task of this loop brings about."""
    for _ in range(round(DEADLINE / 0.01)):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about in time")


class Node:
    """A worker's node at a master; says that it holds prompts, and waits until the master knows."""

    def __init__(self, master: str, worker: FakeWorker, rank: int = 0, **tags: str) -> None:
        self._tags = worker.tags | {"dp": str(rank)} | tags
        told = {"http": worker.url.removeprefix("http://"), **self._tags}
        name = f"{worker.name}:dp{rank}:tp{tags.get('tp', 0)}"
        registration = Registration(name, tags=tuple(f"{k}={v}" for k, v in told.items()))
        self._held: dict[int, list[bytes]] = {}
        self._client = MasterClient(master, registration, snapshot=lambda: list(self._held.items()))
        self._client.start()

    def hold(self, text: str, tier: int, namespace: Namespace = NO_NAMESPACE) -> None:
        hashes = hasher_of(self._tags).hashes([ord(character) for character in text], namespace)
        self._held.setdefault(tier, []).extend(hashes)
        self._client.report(hashes, tier)
        assert self._client.flush(DEADLINE)

    def flush(self) -> None:
        assert self._client.flush(DEADLINE)

    def close(self) -> None:
        self._client.close()


@dataclass
class Reply:
    """What a client of the router got."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def worker(self) -> str:
        return self.headers["x-umbp-worker"]

    @property
    def why(self) -> str:
        return self.headers["x-umbp-why"]


class Caller:
    """A client of a router."""

    def __init__(self, http: aiohttp.ClientSession, port: int) -> None:
        self._http = http
        self._url = f"http://127.0.0.1:{port}"

    async def complete(self, prompt: Any, path: str = "/v1/completions", **fields: Any) -> Reply:
        key = "messages" if "chat" in path else "prompt"
        return await self.post(path, json.dumps({"model": MODEL, key: prompt, **fields}).encode())

    async def post(self, path: str, body: bytes, **headers: str) -> Reply:
        async with self._http.post(self._url + path, data=body, headers=headers) as response:
            return Reply(response.status, await response.read(), {k.lower(): v for k, v in response.headers.items()})

    async def stream(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        async with self._http.post(self._url + path, data=body) as response:
            async for piece in response.content.iter_any():
                yield piece

    async def get(self, path: str) -> Reply:
        async with self._http.get(self._url + path) as response:
            return Reply(response.status, await response.read(), {k.lower(): v for k, v in response.headers.items()})


@asynccontextmanager
async def calling(port: int) -> AsyncIterator[Caller]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE)) as http:
        yield Caller(http, port)
