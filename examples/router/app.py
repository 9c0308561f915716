"""The HTTP side: an OpenAI-compatible door in front of the workers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

from examples.router.books import Books, Seat, Worker
from examples.router.fleet import Fleet
from examples.router.forwarding import Answer, BrokeOff, Forwarder, WorkerFailed, open_session
from examples.router.metrics import RouterMetrics
from examples.router.planner import NoWorker, Plan, Planner, Prompt
from examples.router.settings import Policy, RouterSettings
from umbp_connectors.client.reader import MasterReader
from umbp_connectors.prompt_hashes.hasher import Namespace
from umbp_connectors.prompt_hashes.requests import CHAT, COMPLETIONS, Unreadable, namespace_of, question_of

logger = logging.getLogger(__name__)

WORKER_HEADER = "x-umbp-worker"
WHY_HEADER = "x-umbp-why"


class Router:
    """Answers requests; made in the loop that serves it."""

    def __init__(self, settings: RouterSettings, http: aiohttp.ClientSession, reader: MasterReader | None) -> None:
        self.books = Books(settings.speeds)
        self.metrics = RouterMetrics()
        self.fleet = Fleet(self.books, http, reader, settings)
        self._forwarder = Forwarder(http, settings)
        self._planner = Planner(self.books, reader, settings)
        self._needs_tokens = reader is not None and settings.policy is Policy.KV
        self._attempts = settings.attempts

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """``/v1/completions`` and ``/v1/chat/completions``."""
        raw = await request.read()
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return _error(400, "the body is no JSON object")
        begin = perf_counter()
        try:
            plan = await self._planner.plan(await self._prompt(request, body, len(raw)))
        except NoWorker as error:
            return _error(503, str(error))
        self.metrics.decided(plan.decision, plan.cause, perf_counter() - begin)
        return await self._serve(request, raw, plan)

    async def health(self, request: web.Request) -> web.Response:
        """200 while any worker answers."""
        alive = sorted(worker.url for worker in self.books if worker.alive)
        return web.json_response({"workers": alive}, status=200 if alive else 503)

    async def models(self, request: web.Request) -> web.Response:
        """What any worker serves."""
        names = sorted({name for worker in self.books if worker.alive for name in worker.models})
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def scrape(self, request: web.Request) -> web.Response:
        """For Prometheus."""
        return web.Response(body=self.metrics.page(self.books), content_type="text/plain", charset="utf-8")

    async def _prompt(self, request: web.Request, body: Mapping[str, Any], length: int) -> Prompt:
        """What can be known of a request; asks the least busy worker for its tokens."""
        model = body.get("model") if isinstance(body.get("model"), str) else ""
        candidates = self.books.candidates(model or "")
        if not candidates or not self._needs_tokens:
            return Prompt(model or "", length)
        worker, _ = min(candidates, key=lambda pair: pair[1].outstanding)
        try:
            question = question_of(request.path, body)
            namespace = namespace_of(body, worker.models.get(model or "", Namespace()))
            tokens = question.tokens
            if tokens is None:
                tokens = await self._forwarder.tokens(worker, question, request.headers)
        except Unreadable as error:
            return Prompt(model or "", length, unknown=str(error))
        return Prompt(model or "", length, tokens, namespace)

    async def _serve(self, request: web.Request, raw: bytes, plan: Plan) -> web.StreamResponse:
        """Try one worker after the other until one answers, and pass its answer on."""
        failures: list[str] = []
        for rank, (worker, seat) in enumerate(plan.places()):
            if failures and not worker.alive:
                continue  # another of its ranks failed just now
            if len(failures) == self._attempts:
                break
            ticket = worker.take(seat, plan.decision.ranking[rank].work_seconds)
            begin = perf_counter()
            try:
                answer = await self._forwarder.send(worker, seat, request.path, request.headers, raw)
                ticket.answering = True
                self.metrics.first_byte(seat.name, perf_counter() - begin)
                return await self._pass_on(request, answer, seat, plan.decision.why(rank))
            except WorkerFailed as error:
                self._failed(worker, seat, error)
                failures.append(str(error))
            finally:
                seat.end(ticket)
        return _error(502, "no worker answered: " + "; ".join(failures))

    async def _pass_on(self, request: web.Request, answer: Answer, seat: Seat, why: str) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers=answer.headers())
        response.headers[WORKER_HEADER] = seat.name
        response.headers[WHY_HEADER] = _for_header(why)
        try:
            await response.prepare(request)
            async for piece in answer.pieces():
                await response.write(piece)
            await response.write_eof()
        except BrokeOff as error:
            logger.warning("an answer of %s broke off: %s", seat.name, error)
            self.metrics.failed(seat.name, "broke_off")
            if request.transport is not None:
                request.transport.abort()  # the client must not take what it has for the whole
        except ConnectionError:
            logger.debug("a client left before its answer from %s ended", seat.name)
        else:
            self.metrics.answered(seat.name, answer.status)
        finally:
            answer.close()
        return response

    def _failed(self, worker: Worker, seat: Seat, error: WorkerFailed) -> None:
        logger.warning("%s; another worker is tried", error)
        self.metrics.failed(seat.name, error.cause)
        worker.alive = False  # until the next look says otherwise


class RunningRouter(NamedTuple):
    """A router, and the port where it listens."""

    router: Router
    port: int


@asynccontextmanager
async def running(settings: RouterSettings, reader: MasterReader | None = None) -> AsyncIterator[RunningRouter]:
    """A router that serves until the context ends; it has looked at its workers once.  Closes ``reader``."""
    async with open_session() as http:
        router = Router(settings, http, reader)
        await router.fleet.refresh()
        runner = web.AppRunner(_app(router, settings.max_body), handler_cancellation=True, access_log=None)
        await runner.setup()
        looking = asyncio.create_task(router.fleet.run())
        try:
            site = web.TCPSite(runner, settings.host, settings.port)
            await site.start()
            yield RunningRouter(router, runner.addresses[0][1])
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            await runner.cleanup()
            if reader is not None:
                reader.close()


def _app(router: Router, max_body: int) -> web.Application:
    app = web.Application(client_max_size=max_body)
    app.router.add_post(COMPLETIONS, router.complete)
    app.router.add_post(CHAT, router.complete)
    app.router.add_get("/v1/models", router.models)
    app.router.add_get("/health", router.health)
    app.router.add_get("/metrics", router.scrape)
    return app


def _error(status: int, message: str) -> web.Response:
    """In OpenAI's form."""
    body = {"error": {"message": message, "type": "router_error", "code": status}}
    return web.json_response(body, status=status)


def _for_header(text: str) -> str:
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())
