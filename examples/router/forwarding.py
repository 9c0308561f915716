"""One request to one worker, with a deadline for everything."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from multidict import CIMultiDict

from examples.router.books import Seat, Worker
from examples.router.settings import RouterSettings
from umbp_connectors.prompt_hashes.requests import Question, Unreadable, tokens_of

_OF_ONE_HOP = frozenset(
    {
        "connection",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers between two neighbours, which are not passed on."""
_REPLACED = frozenset({"content-length", "x-data-parallel-rank"})
_ILL = frozenset({502, 503, 504})
"""A worker that answers with these has not begun, and another may do better."""
RANK_HEADER = "X-data-parallel-rank"
"""How vLLM is told which data-parallel rank serves a request."""
RANK_FIELD = "routed_dp_rank"
"""How SGLang is."""


class BrokeOff(Exception):
    """A worker's answer ended before its end; some of it may have reached the client."""


class WorkerFailed(Exception):
    """A worker gave no first byte; ``cause`` is a label.  Another may be tried: nothing has reached the client."""

    def __init__(self, seat: Seat, cause: str, detail: str) -> None:
        super().__init__(f"{seat.name} {detail}")
        self.cause = cause


@dataclass(slots=True)
class Answer:
    """A worker's answer whose first piece is here; the rest comes from :meth:`pieces`."""

    response: aiohttp.ClientResponse
    first: bytes
    idle_timeout: float

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.response.status

    def headers(self) -> CIMultiDict[str]:
        """Those that are for the client."""
        return CIMultiDict(pair for pair in self.response.headers.items() if pair[0].lower() not in _OF_ONE_HOP)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The answer as it comes.  Raises ``BrokeOff``."""
        piece = self.first
        while piece:
            yield piece
            try:
                piece = await asyncio.wait_for(self.response.content.readany(), self.idle_timeout)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                raise BrokeOff(type(error).__name__) from error

    def close(self) -> None:
        """No more is wanted: an engine that still computes is told by the closed connection."""
        self.response.close()


def _steered(seat: Seat, body: bytes) -> bytes:
    """``body`` with the rank that is to serve it, where the engine wants it there (vLLM reads the header)."""
    if seat.rank is None or seat.tags.get("engine") != "sglang":
        return body
    return json.dumps({**json.loads(body), RANK_FIELD: seat.rank}).encode()


def open_session() -> aiohttp.ClientSession:
    """A session for workers; to be closed.

    Answers are passed on as they are encoded.  Idle connections are kept for less time than servers keep them (uvicorn:
    5 s), so that a request never meets one that is being closed.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    return aiohttp.ClientSession(
        auto_decompress=False, connector=connector, skip_auto_headers=("Accept-Encoding", "User-Agent")
    )


class Forwarder:
    """Sends requests over one session; one loop's thread."""

    def __init__(self, http: aiohttp.ClientSession, settings: RouterSettings) -> None:
        self._http = http
        self._settings = settings

    async def send(self, worker: Worker, seat: Seat, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send a request, and wait for the first piece of its answer.  Raises ``WorkerFailed``."""
        sent = {name: value for name, value in headers.items() if name.lower() not in _OF_ONE_HOP | _REPLACED}
        if seat.rank is not None:
            sent[RANK_HEADER] = str(seat.rank)
        opening = self._open(worker.url + path, sent, _steered(seat, body))
        try:
            answer = await asyncio.wait_for(opening, self._settings.first_byte_timeout)
        except asyncio.TimeoutError:
            raise WorkerFailed(seat, "timeout", "gave no first byte in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerFailed(seat, "connection", f"failed: {type(error).__name__}") from error
        if answer.status in _ILL:
            answer.close()
            raise WorkerFailed(seat, "status", f"answered with {answer.status}")
        return answer

    async def tokens(self, worker: Worker, question: Question, headers: Mapping[str, str]) -> list[int]:
        """The tokens of a prompt, from the worker's tokenizer.  Raises ``Unreadable``."""
        kept = {name: value for name, value in headers.items() if name.lower() == "authorization"}
        timeout = aiohttp.ClientTimeout(total=self._settings.tokenize_timeout)
        url = f"{worker.url}/tokenize"
        try:
            async with self._http.post(url, json=question.body, headers=kept, timeout=timeout) as response:
                answer: Any = await response.json() if response.status == 200 else None
        except asyncio.TimeoutError:
            raise Unreadable("/tokenize gave no answer in time") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unreadable(f"/tokenize failed: {type(error).__name__}") from error
        return tokens_of(answer)

    async def _open(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout)
        response = await self._http.post(url, data=body, headers=headers, timeout=timeout)
        with contextlib.ExitStack() as failed:
            failed.callback(response.close)
            first = await response.content.readany()
            failed.pop_all()
        return Answer(response, first, self._settings.idle_timeout)
