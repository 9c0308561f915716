"""The router in front of fake workers, with a real master that nodes tell what they hold."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from examples.router.app import RunningRouter, running
from examples.router.costs import Speeds
from examples.router.settings import Policy, RouterSettings
from tests.master.app.master_process import MasterProcess
from tests.router.fakes import DEADLINE, MODEL, Caller, FakeWorker, Node, calling, until
from umbp_connectors.client.reader import MasterReader
from umbp_connectors.client.settings import ClientSettings
from umbp_connectors.prompt_hashes.hasher import Namespace
from umbp_core.tiers import Tier

PROMPT = "a prompt of forty characters, ten blocks."
SETTINGS = RouterSettings(port=0, refresh_interval=0.05, look_timeout=60.0, match_timeout=60.0, tokenize_timeout=60.0)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with MasterProcess(tmp_path_factory.mktemp("master")) as process:
        yield f"umbp://{process.doors['native']}"


@dataclass
class Setting:
    """Everything of one test."""

    a: FakeWorker
    b: FakeWorker
    router: RunningRouter
    call: Caller

    def metric(self, name: str) -> dict[str, float]:
        page = self.router.router.metrics.page(self.router.router.books).decode()
        rows = [line.rpartition(" ") for line in page.splitlines() if line.startswith(name)]
        return {key: float(value) for key, _, value in rows}


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


@asynccontextmanager
async def setting(settings: RouterSettings = SETTINGS, master: str = "", nodes: bool = True) -> AsyncIterator[Setting]:
    """Two workers, listed, or known from their nodes at ``master``."""
    async with AsyncExitStack() as stack:
        a, b = [await stack.enter_async_context(FakeWorker(name)) for name in ("a", "b")]
        if not master or not nodes:
            settings = replace(settings, workers=(a.url, b.url))
        reader = MasterReader(master, settings=ClientSettings(query_timeout=60.0)) if master else None
        router = await stack.enter_async_context(running(settings, reader))
        call = await stack.enter_async_context(calling(router.port))
        yield Setting(a, b, router, call)


@asynccontextmanager
async def with_nodes(master: str, settings: RouterSettings = SETTINGS) -> AsyncIterator[tuple[Setting, Node, Node]]:
    """The same with a node per worker, which are there before the router looks."""
    async with AsyncExitStack() as stack:
        a, b = [await stack.enter_async_context(FakeWorker(name)) for name in ("a", "b")]
        nodes = []
        for worker in (a, b):
            node = await asyncio.to_thread(Node, master, worker)
            stack.callback(node.close)
            await asyncio.to_thread(node.flush)
            nodes.append(node)
        reader = MasterReader(master, settings=ClientSettings(query_timeout=60.0))
        router = await stack.enter_async_context(running(settings, reader))
        call = await stack.enter_async_context(calling(router.port))
        yield Setting(a, b, router, call), nodes[0], nodes[1]


def test_without_a_master_the_work_is_shared_out_and_answers_are_passed_on() -> None:
    async def test() -> None:
        async with setting() as s:
            replies = [await s.call.complete(PROMPT, stream=True) for _ in range(4)]
            assert [reply.worker for reply in replies] == [s.a.url, s.b.url] * 2
            assert {reply.body for reply in replies} == {b"data: one\n\ndata: two\n\n"}
            assert replies[0].headers["x-engine"] == "e"
            assert replies[0].why.startswith("load; no master; ")
            assert s.a.requests[0] == {"model": MODEL, "prompt": PROMPT, "stream": True}
            assert s.a.tokenized == s.b.tokenized == []
            assert s.metric('umbp_router_degraded_total{cause="no_master"}') == {
                'umbp_router_degraded_total{cause="no_master"}': 4.0
            }

    run(test())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_prompt_goes_where_its_kv_is(master: str, path: str) -> None:
    async def test() -> None:
        async with with_nodes(master) as (s, _, b):
            await asyncio.to_thread(b.hold, PROMPT, Tier.DRAM)
            prompt = PROMPT if "chat" not in path else [{"role": "user", "content": PROMPT}]
            replies = [await s.call.complete(prompt, path) for _ in range(3)]
            assert [reply.worker for reply in replies] == [s.b.url] * 3
            assert replies[0].why.startswith("prefix; holds 40 of 41 tokens (blocks: 10 DRAM); ")
            other = await s.call.complete("something else of more than a block")
            assert (other.worker, other.why.split(";")[0]) == (s.a.url, "load")
            held = s.metric("umbp_router_held_tokens_total")
            assert held == {'umbp_router_held_tokens_total{tier="DRAM"}': 120.0}

    run(test())


def test_the_cheapest_tier_wins_and_each_life_of_the_index_counts(master: str) -> None:
    async def test() -> None:
        async with with_nodes(master) as (s, a, b):
            await asyncio.to_thread(a.hold, PROMPT, Tier.SSD)
            assert (await s.call.complete(PROMPT)).worker == s.a.url
            await asyncio.to_thread(b.hold, PROMPT, Tier.DRAM)
            assert (await s.call.complete(PROMPT)).worker == s.b.url
            await asyncio.to_thread(a.hold, PROMPT, Tier.HBM)
            reply = await s.call.complete(PROMPT)
            assert (reply.worker, "10 HBM" in reply.why) == (s.a.url, True)

    run(test())


def test_tokens_need_no_tokenizer_and_a_salt_keeps_prompts_apart(master: str) -> None:
    async def test() -> None:
        async with with_nodes(master) as (s, _, b):
            await asyncio.to_thread(b.hold, PROMPT, Tier.HBM, Namespace(cache_salt="tenant"))
            tokens = [ord(character) for character in PROMPT]
            reply = await s.call.complete(tokens, cache_salt="tenant")
            assert (reply.worker, reply.why.split(";")[0]) == (s.b.url, "prefix")
            assert (await s.call.complete(tokens)).why.startswith("load; ")
            assert (await s.call.complete([tokens], cache_salt="tenant")).worker == s.b.url
            assert s.a.tokenized == s.b.tokenized == []

    run(test())


def test_an_adapter_has_blocks_of_its_own(master: str) -> None:
    async def test() -> None:
        async with with_nodes(master) as (s, _, b):
            cards = [{"id": MODEL, "parent": None}, {"id": "poet", "root": "/adapters/poet", "parent": MODEL}]
            s.a.models = s.b.models = cards
            await s.router.router.fleet.refresh()
            await asyncio.to_thread(b.hold, PROMPT, Tier.HBM, Namespace(lora_name="poet", lora_path="/adapters/poet"))
            assert (await s.call.complete(PROMPT, model="poet")).worker == s.b.url
            assert (await s.call.complete(PROMPT)).why.startswith("load; ")

    run(test())


def test_a_request_goes_only_where_its_model_is_served() -> None:
    async def test() -> None:
        async with setting() as s:
            s.b.models = [{"id": "other"}]
            await s.router.router.fleet.refresh()
            replies = [await s.call.complete(PROMPT, model="other") for _ in range(2)]
            assert [reply.worker for reply in replies] == [s.b.url] * 2
            missing = await s.call.complete(PROMPT, model="unheard-of")
            assert (missing.status, b"unheard-of" in missing.body) == (503, True)
            names = json.loads((await s.call.get("/v1/models")).body)
            assert [card["id"] for card in names["data"]] == [MODEL, "other"]

    run(test())


def test_a_busy_worker_is_passed_over_for_a_prompt_that_is_worth_less_than_the_wait(master: str) -> None:
    async def test() -> None:
        async with with_nodes(master) as (s, a, _):
            await asyncio.to_thread(a.hold, PROMPT, Tier.HBM)
            s.a.gate = asyncio.Event()
            begun = [asyncio.create_task(s.call.complete(PROMPT + "x" * 400)) for _ in range(1)]
            await until(lambda: bool(s.a.requests))
            reply = await s.call.complete(PROMPT)
            assert (reply.worker, reply.why.split(";")[0]) == (s.b.url, "queue")
            s.a.gate.set()
            assert {each.worker for each in await asyncio.gather(*begun)} == {s.a.url}
            assert sum(s.metric("umbp_router_outstanding").values()) == 0

    run(test())


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_rank_of_a_server_is_asked_for_as_its_engine_wants_it(master: str, engine: str) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            worker = await stack.enter_async_context(FakeWorker("ranks"))
            worker.tags |= {"engine": engine}
            nodes = [await asyncio.to_thread(Node, master, worker, rank) for rank in range(3)]
            for node in nodes:
                stack.callback(node.close)
                await asyncio.to_thread(node.flush)
            await asyncio.to_thread(nodes[2].hold, PROMPT, Tier.HBM)
            router = await stack.enter_async_context(running(SETTINGS, MasterReader(master)))
            call = await stack.enter_async_context(calling(router.port))
            reply = await call.complete(PROMPT)
            assert reply.worker == f"{worker.url}#dp2"
            assert worker.headers[-1]["X-data-parallel-rank"] == "2"
            asked = {"model": MODEL, "prompt": PROMPT}
            assert worker.requests == [asked if engine == "vllm" else {**asked, "routed_dp_rank": 2}]

    run(test())


def test_what_not_every_rank_has_in_its_storage_counts_for_nothing(master: str) -> None:
    """The first rank's caches are like the others'; their storages are their own."""

    async def test() -> None:
        async with with_nodes(master) as (s, a, b):
            rank = await asyncio.to_thread(Node, master, s.a, tp="1")
            try:
                await asyncio.to_thread(a.hold, PROMPT, Tier.SSD)
                await asyncio.to_thread(rank.hold, PROMPT[:20], Tier.SSD)
                await asyncio.to_thread(b.hold, PROMPT[:28], Tier.SSD)
                await until(lambda: any(seat.others for seat in s.router.router.books.workers[s.a.url].seats.values()))
                reply = await s.call.complete(PROMPT)
                assert reply.worker == s.b.url
                assert reply.why.startswith("prefix; holds 28 of 41 tokens (blocks: 7 SSD)")
                await asyncio.to_thread(rank.hold, PROMPT, Tier.DRAM)
                reply = await s.call.complete(PROMPT)
                assert (reply.worker, "10 SSD" in reply.why) == (s.a.url, True)
            finally:
                await asyncio.to_thread(rank.close)

    run(test())


def test_nodes_that_cannot_take_requests_are_not_asked(master: str) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            worker = await stack.enter_async_context(FakeWorker("prefills"))
            other = await stack.enter_async_context(FakeWorker("second"))
            for node in (
                await asyncio.to_thread(Node, master, worker, 0, role="prefill"),
                await asyncio.to_thread(Node, master, other, 1, tp="1"),
            ):
                stack.callback(node.close)
                await asyncio.to_thread(node.flush)
            router = await stack.enter_async_context(running(SETTINGS, MasterReader(master)))
            call = await stack.enter_async_context(calling(router.port))
            assert (await call.complete(PROMPT)).status == 503
            assert (await call.get("/health")).status == 503

    run(test())


@pytest.mark.parametrize("gone", ["closed", "ill"])
def test_another_worker_is_tried_when_the_best_gives_no_first_byte(master: str, gone: str) -> None:
    async def test() -> None:
        async with with_nodes(master, replace(SETTINGS, refresh_interval=60.0)) as (s, a, _):
            await asyncio.to_thread(a.hold, PROMPT, Tier.HBM)
            if gone == "closed":
                await s.a.close()
            else:
                s.a.status = 503
            reply = await s.call.complete([ord(character) for character in PROMPT])
            assert (reply.status, reply.worker) == (200, s.b.url)
            assert reply.why.startswith("retry 1; ")
            assert sum(s.metric("umbp_router_worker_failures_total").values()) == 1
            again = await s.call.complete([ord(character) for character in PROMPT])
            assert (again.worker, again.why.startswith("retry")) == (s.b.url, False)

    run(test())


def test_a_worker_that_comes_back_is_used_again() -> None:
    async def test() -> None:
        async with setting() as s:
            port = int(s.a.url.rpartition(":")[2])
            await s.a.close()
            assert {(await s.call.complete(PROMPT)).worker for _ in range(4)} == {s.b.url}
            await s.a.open(port)
            await until(lambda: s.router.router.books.workers[s.a.url].alive)
            assert {(await s.call.complete(PROMPT)).worker for _ in range(4)} == {s.a.url, s.b.url}

    run(test())


def test_a_stream_is_passed_on_piece_by_piece() -> None:
    async def test() -> None:
        async with setting() as s:
            s.a.later = s.b.later = asyncio.Event()
            body = json.dumps({"model": MODEL, "prompt": PROMPT, "stream": True}).encode()
            stream = s.call.stream("/v1/completions", body)
            assert await anext(stream) == b"data: one\n\n", "the second is not there yet"
            assert sum(s.metric("umbp_router_outstanding").values()) == 1
            s.a.later.set()
            assert [piece async for piece in stream] == [b"data: two\n\n"]

    run(test())


def test_an_error_of_the_engine_is_the_clients() -> None:
    async def test() -> None:
        async with setting() as s:
            s.a.status = s.b.status = 400
            reply = await s.call.complete(PROMPT)
            assert (reply.status, reply.body) == (400, b"data: one\n\ndata: two\n\n")
            assert len(s.a.requests) + len(s.b.requests) == 1

    run(test())


def test_when_nobody_answers_the_client_is_told() -> None:
    async def test() -> None:
        async with setting(replace(SETTINGS, refresh_interval=60.0)) as s:
            await s.a.close()
            await s.b.close()
            reply = await s.call.complete(PROMPT)
            assert (reply.status, reply.body.count(b"failed: ")) == (502, 2)
            assert (await s.call.complete(PROMPT)).status == 503

    run(test())


def test_a_worker_that_hangs_is_given_up_after_the_deadline() -> None:
    async def test() -> None:
        async with setting(replace(SETTINGS, first_byte_timeout=2.0, refresh_interval=60.0)) as s:
            s.a.gate = asyncio.Event()
            reply = await s.call.complete(PROMPT)
            assert (reply.status, reply.worker) == (200, s.b.url)
            await asyncio.wait_for(s.a.left.wait(), DEADLINE)

    run(test())


def test_an_answer_that_breaks_off_is_not_passed_on_as_whole() -> None:
    async def test() -> None:
        async with setting() as s:
            s.a.breaks = s.b.breaks = True
            with pytest.raises(aiohttp.ClientError):
                await s.call.complete(PROMPT)
            assert len(s.a.requests) + len(s.b.requests) == 1, "the client has a part of it: nobody else may answer"
            await until(lambda: bool(s.metric("umbp_router_worker_failures_total")))

    run(test())


def test_a_client_that_leaves_frees_the_worker() -> None:
    async def test() -> None:
        async with setting() as s:
            s.a.gate = asyncio.Event()
            asked = asyncio.create_task(s.call.complete(PROMPT))
            await until(lambda: bool(s.a.requests))
            asked.cancel()
            await asyncio.wait_for(s.a.left.wait(), DEADLINE)
            assert s.b.requests == [], "who has left needs no second try"
            await until(lambda: sum(s.metric("umbp_router_outstanding").values()) == 0)

    run(test())


@pytest.mark.parametrize(
    ("case", "cause"),
    [("no tokenizer", "no_tokens"), ("an image", "no_tokens"), ("random start", "no_hashes"), ("no nodes", "no_nodes")],
)
def test_what_is_not_known_is_said_and_costs_only_the_affinity(master: str, case: str, cause: str) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            worker = await stack.enter_async_context(FakeWorker(f"lonely-{cause}"))
            prompt: Any = PROMPT
            settings = SETTINGS
            if case == "no tokenizer":
                worker.tokenizes = False
            if case == "random start":
                worker.tags |= {"hash_start": "random"}
            path = "/v1/completions"
            if case == "an image":
                path = "/v1/chat/completions"
                prompt = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
            if case == "no nodes":
                settings = replace(SETTINGS, workers=(worker.url,))
            else:
                node = await asyncio.to_thread(Node, master, worker)
                stack.callback(node.close)
                await asyncio.to_thread(node.flush)
            router = await stack.enter_async_context(running(settings, MasterReader(master)))
            call = await stack.enter_async_context(calling(router.port))
            reply = await call.complete(prompt, path)
            assert (reply.status, reply.worker) == (200, worker.url)
            page = (await call.get("/metrics")).body.decode()
            assert f'umbp_router_degraded_total{{cause="{cause}"}} 1.0' in page

    run(test())


def test_a_master_that_goes_away_costs_the_affinity_and_nothing_else(tmp_path: Path) -> None:
    async def test(process: MasterProcess) -> None:
        settings = replace(SETTINGS, match_timeout=0.2)
        async with with_nodes(f"umbp://{process.doors['native']}", settings) as (s, _, b):
            await asyncio.to_thread(b.hold, PROMPT, Tier.HBM)
            found = await s.call.complete(PROMPT)
            while not found.why.startswith("prefix; "):  # a busy machine's master may take longer than that
                found = await s.call.complete(PROMPT)
            assert found.worker == s.b.url
            await asyncio.to_thread(process.end, signal.SIGKILL)
            replies = [await s.call.complete(PROMPT) for _ in range(4)]
            assert {reply.status for reply in replies} == {200}
            assert {reply.worker for reply in replies} == {s.a.url, s.b.url}
            assert all(reply.why.startswith("load; the master does not answer; ") for reply in replies)

    with MasterProcess(tmp_path) as process:
        run(test(process))


def test_in_turn_nobody_looks_at_what_is_held(master: str) -> None:
    async def test() -> None:
        async with with_nodes(master, replace(SETTINGS, policy=Policy.TURN)) as (s, _, b):
            await asyncio.to_thread(b.hold, PROMPT, Tier.HBM)
            replies = [await s.call.complete(PROMPT) for _ in range(4)]
            assert [reply.worker for reply in replies] == [replies[0].worker, replies[1].worker] * 2
            assert replies[0].worker != replies[1].worker

    run(test())


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff"])
def test_a_body_that_is_no_object_is_the_clients_fault(body: bytes) -> None:
    async def test() -> None:
        async with setting() as s:
            assert (await s.call.post("/v1/completions", body)).status == 400
            assert s.a.requests == s.b.requests == []

    run(test())


def test_headers_reach_the_worker_and_bodies_reach_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with setting(replace(SETTINGS, refresh_interval=60.0)) as s:
            body = json.dumps({"model": MODEL, "prompt": "a secret"}).encode()
            await s.call.post("/v1/completions", body, Authorization="Bearer key", Connection="close")
            (headers,) = s.a.headers + s.b.headers
            assert headers["Authorization"] == "Bearer key"
            assert headers.get("Connection") != "close"
            await s.a.close()
            await s.b.close()
            await s.call.post("/v1/completions", body)

    with caplog.at_level(logging.DEBUG):
        run(test())
    assert caplog.records
    assert "a secret" not in caplog.text


METRICS = """\
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting {waiting}
# TYPE vllm:request_prefill_time_seconds histogram
vllm:request_prefill_time_seconds_sum {seconds}
# TYPE vllm:request_prefill_kv_computed_tokens histogram
vllm:request_prefill_kv_computed_tokens_sum {tokens}
"""


def test_speeds_are_read_off_the_workers_and_what_waits_there_counts() -> None:
    async def test() -> None:
        async with setting(replace(SETTINGS, refresh_interval=60.0)) as s:
            fleet, books = s.router.router.fleet, s.router.router.books
            for step in range(40):
                s.a.metrics = METRICS.format(waiting=0, seconds=step * 2.0, tokens=step * 1000.0)
                await fleet.refresh()
            assert books.speeds.prefill == pytest.approx(0.002, rel=0.01)
            await s.call.complete(PROMPT)
            await s.call.complete(PROMPT)
            s.a.metrics = METRICS.format(waiting=5, seconds=78.0, tokens=39_000.0)
            await fleet.refresh()
            assert books.workers[s.a.url].foreign_waiting == 5
            assert {(await s.call.complete(PROMPT)).worker for _ in range(4)} == {s.b.url}

    run(test())


def test_workers_that_want_a_key_are_shown_the_routers() -> None:
    async def test() -> None:
        async with setting(replace(SETTINGS, api_key="right")) as s:
            s.a.key, s.b.key = "right", "another"
            await s.router.router.fleet.refresh()
            assert {(await s.call.complete(PROMPT)).worker for _ in range(2)} == {s.a.url}
            assert "right" not in repr(replace(SETTINGS, api_key="right"))

    run(test())


def test_a_page_of_metrics_that_is_none_costs_nothing() -> None:
    async def test() -> None:
        async with setting() as s:
            s.a.metrics = s.b.metrics = "<html>"
            before = s.router.router.books.speeds
            await s.router.router.fleet.refresh()
            assert s.router.router.books.speeds == before
            assert {(await s.call.complete(PROMPT)).worker for _ in range(2)} == {s.a.url, s.b.url}

    run(test())


def test_speeds_that_a_user_gives_decide(master: str) -> None:
    """With an SSD that is slower than to compute, a worker that holds a prompt there is not cheaper."""

    async def test() -> None:
        speeds = Speeds(tiers={Tier.HBM: 0.0, Tier.SSD: 1.0})
        async with with_nodes(master, replace(SETTINGS, speeds=speeds)) as (s, a, b):
            await asyncio.to_thread(a.hold, PROMPT, Tier.SSD)
            await asyncio.to_thread(b.hold, PROMPT[:8], Tier.HBM)
            reply = await s.call.complete(PROMPT)
            assert (reply.worker, reply.why.split(";")[0]) == (s.b.url, "queue")

    run(test())
