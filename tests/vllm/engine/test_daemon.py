"""Real engines over the host's daemon: what is in DRAM outlives an engine, several share it, and one may be killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.daemon.processes import Process, daemon
from tests.connectors.waiting import until
from tests.master.app.master_process import CALL, MasterProcess
from tests.vllm.engine.local import BLOCK, Ask, Engine, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.engine.processes import children, in_child
from tests.vllm.engine.test_parallel import PP, TP, serve_ranks
from tests.vllm.harness.reported import published as hash_of
from tests.vllm.models import prompt
from umbp_connectors.daemon.link import inspect, list_objects
from umbp_connectors.daemon.listing import ListObjects
from umbp_connectors.daemon.messages import REVISION
from umbp_core.tiers import Tier

WHOLE = 192
LAYER_BYTES = 512 * BLOCK
"""Of the llama's four layers, each has a quarter of the KV."""
_WAIT_S = 60.0


def over(socket: Path, **extra: Any) -> dict[str, Any]:
    """A configuration for the daemon at ``socket``; a busy machine may take its time to answer."""
    return pool(mode="daemon", daemon_socket=str(socket), lookup_timeout_ms=60_000, call_timeout_ms=60_000, **extra)


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    """Where the daemon is."""
    return tmp_path / "run" / "daemon.sock"


@pytest.fixture
def first(socket: Path) -> Iterator[Process]:
    """A daemon."""
    process = daemon(socket, "--dram-capacity", "64MiB")
    yield process
    process.kill()


def published(opened: Engine) -> None:
    """Wait until the daemon has everything that the engine has stored."""
    opened.drain()
    deadline = time.monotonic() + _WAIT_S
    while opened.leader.pool.host.stock.pending:
        opened.llm.llm_engine.step()
        opened.leader.pool.settle()
        assert time.monotonic() < deadline, "the daemon does not take what was stored"


def clients(socket: Path) -> list[str]:
    """Who uses the daemon's only pool."""
    (view,) = inspect(socket, time.monotonic() + _WAIT_S).pools
    return view.clients


def in_dram(socket: Path) -> set[bytes]:
    """What the daemon has in memory, as vLLM publishes it."""
    listing = list_objects(socket, ListObjects(REVISION, Tier.DRAM), time.monotonic() + _WAIT_S)
    return {hash_of(each.key[:-4]) for each in listing.objects}


def test_an_engine_restart_keeps_what_is_in_dram(
    llama: Path, oracle: Oracle, first: Process, socket: Path, tmp_path: Path
) -> None:
    """And a master is told of it, before the first request."""
    asks = [Ask(prompt(200, seed=seed)) for seed in (900, 901)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    with engine(llama, kv_transfer_config=over(socket)) as opened:
        cold = opened.ask(*asks)
    with contextlib.ExitStack() as ending:
        master = ending.enter_context(MasterProcess(tmp_path))
        asking = ending.enter_context(contextlib.closing(master.native()))
        told = {"master_address": f"umbp://{master.doors['native']}", "node_id": "n"}
        opened = ending.enter_context(engine(llama, kv_transfer_config=over(socket, **told)))
        until(lambda: set(asking.list_blocks("n", Tier.DRAM, 0, 1000, CALL).hashes) == in_dram(socket) != set())
        again = opened.ask(*asks)
        loaded = opened.metric("vllm:umbp_hit_tokens", tier="dram")
        stored = opened.metric("vllm:umbp_stored_blocks", tier="dram")
    assert [reply.tokens for reply in cold] == [reply.tokens for reply in again] == right
    assert [reply.cached for reply in again] == [WHOLE, WHOLE]
    assert (loaded, stored) == (2 * WHOLE, 0)


def test_two_engines_share_a_pool_one_is_killed_and_the_daemon_too(
    llama: Path, oracle: Oracle, first: Process, socket: Path
) -> None:
    ours, theirs = children().Pipe(duplex=False)
    other = children().Process(target=_serve_for_ever, args=(llama, socket, theirs))
    other.start()
    theirs.close()
    asks = [Ask(prompt(200, seed=1000 + number)) for number in range(4)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    assert [_next(ours) for _ in asks] == right
    with engine(llama, kv_transfer_config=over(socket)) as opened:
        shared = opened.ask(*asks[:2])
        assert len(clients(socket)) == 2
        answered = [_next(ours) for _ in range(2)]
        other.kill()
        other.join(20)
        after_the_kill = opened.ask(*asks)
        assert len(clients(socket)) == 1
        first.kill()
        opened.forget()
        without = opened.ask(*asks)
        with contextlib.ExitStack() as ending:
            ending.callback(daemon(socket, "--dram-capacity", "64MiB").kill)
            again = _served_again(opened, asks)
            held = opened.metric("vllm:umbp_failed_blocks")
    late = oracle.ask(llama, *[Ask(prompt(200, seed=1004 + number)) for number in range(2)])
    assert answered == [reply.tokens for reply in late]
    assert [reply.tokens for reply in shared] == right[:2]
    assert [reply.tokens for reply in after_the_kill] == right
    assert [reply.tokens for reply in without] == right
    assert [reply.tokens for reply in again] == right
    assert [reply.cached for reply in shared] == [WHOLE] * 2
    assert [reply.cached for reply in after_the_kill] == [WHOLE] * 4
    assert [reply.cached for reply in without] == [0] * 4
    assert held == 0


@pytest.mark.slow
def test_the_ranks_of_an_engine_in_processes_of_their_own(
    llama: Path, oracle: Oracle, first: Process, socket: Path
) -> None:
    asks = [Ask(prompt(300, seed=seed)) for seed in (920, 921)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    (cold,) = in_child(serve_ranks, llama, over(socket), TP, asks, 1, timeout=280)
    (again,) = in_child(serve_ranks, llama, over(socket), TP, asks, 1, timeout=280)
    assert [tokens for tokens, _ in cold] == [tokens for tokens, _ in again] == right
    assert [cached for _, cached in again] == [288] * 2


@pytest.mark.slow
def test_pipeline_stages_of_different_sizes_find_what_was_in_dram_when_they_start_again(
    llama: Path, oracle: Oracle, first: Process, socket: Path
) -> None:
    asks = [Ask(prompt(300, seed=seed)) for seed in (920, 921)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    (cold,) = in_child(_serve_unevenly, llama, over(socket), asks, timeout=280)
    (view,) = inspect(socket, time.monotonic() + _WAIT_S).pools
    assert view.page_bytes == 2 * 3 * LAYER_BYTES, "each of two stages gets as much as three layers need"
    (again,) = in_child(_serve_unevenly, llama, over(socket), asks, timeout=280)
    assert [tokens for tokens, _ in cold] == [tokens for tokens, _ in again] == right
    assert [cached for _, cached in again] == [288] * 2


def _serve_unevenly(model: Path, tiers: dict[str, Any], asks: list[Ask]) -> list[list[tuple[tuple[int, ...], int]]]:
    """Three layers on the first stage, one on the second."""
    os.environ["VLLM_PP_LAYER_PARTITION"] = "3,1"
    return serve_ranks(model, tiers, PP, asks, 1)


def _served_again(opened: Engine, asks: list[Ask]) -> list[Any]:
    """Ask until all comes from the new daemon."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        replies = opened.ask(*asks)
        if all(reply.cached == WHOLE for reply in replies):
            return replies
        published(opened)
        opened.forget()
        assert time.monotonic() < deadline, "the new daemon is not used"


def _next(pipe: Connection) -> tuple[int, ...]:
    assert pipe.poll(200), "the other engine does not answer"
    tokens: tuple[int, ...] = pipe.recv()
    return tokens


def _serve_for_ever(model: Path, socket: Path, pipe: Connection) -> None:
    opened = Engine(model, kv_transfer_config=over(socket))
    for seed in itertools.count(1000):
        reply = opened.ask_one(Ask(prompt(200, seed=seed)))
        published(opened)
        pipe.send(reply.tokens)
