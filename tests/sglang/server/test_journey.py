"""One pool folder through the life of several engines: every form of the start, restarts, a kill, and another engine.

Servers take half a minute each, so that a stage does everything that its server can show and keeps the answers; the
tests look at these.  What the engine computes from nothing is the measure for every later answer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from examples.serving_sglang import PAGE_TOKENS, ServerFailed, SglangAnswer, SglangServer, extra_config
from tests.sglang.server.servers import (
    LAUNCH_SERVER,
    MAX_TOKENS,
    PAGES,
    VLLM_PYTHON,
    drive,
    engine_arguments,
    needs_vllm,
    prompts,
    server,
    vllm_environment,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FIRST = prompts(0, 3)
LAST = prompts(100, 6)
"""What the second server is asked when it is killed."""
IN_VAIN = 500
"""Tokens for each of them."""
SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
WHOLE = PAGES * PAGE_TOKENS

Answers = list[SglangAnswer]


@dataclass
class Stage:
    """What one server answered, by the state of its caches."""

    answers: dict[str, Answers] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)

    def ask(self, running: SglangServer, state: str, questions: Sequence[list[int]] = FIRST) -> None:
        self.answers[state] = [running.complete(each, MAX_TOKENS) for each in questions]


def tokens(answers: Sequence[SglangAnswer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


def descriptors(running: SglangServer) -> set[str]:
    """What the files are called that the processes of a server have open."""
    assert running.process is not None
    parent = psutil.Process(running.process.pid)
    folders = [Path(f"/proc/{each.pid}/fd") for each in [parent, *parent.children(recursive=True)]]
    return {str(path.readlink()) for folder in folders for path in folder.iterdir() if path.is_symlink()}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The pool that all engines here use one after the other."""
    return {
        "dram_capacity": "64MiB",
        "ssd_dir": str(tmp_path_factory.mktemp("pool")),
        "ssd_capacity": "256MiB",
        "ssd_engines": 2,  # vLLM's part stays when SGLang takes its own, and the other way round
    }


@pytest.fixture(scope="module")
def first(model: Path, pool: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """``launch_server``: cold, from the device, from the pool; detached and attached again; stopped."""
    stage = Stage()
    folder = tmp_path_factory.mktemp("first")
    arguments = extra_config(**pool, allocator="shm")
    with server(model, folder, *arguments, launcher=LAUNCH_SERVER) as running:
        stage.ask(running, "cold")
        stage.ask(running, "again")
        running.wait_until_stored(len(FIRST) * PAGES)
        running.flush_cache()
        stage.ask(running, "flushed")
        stage.seen["files"] = descriptors(running)
        running.flush_cache()
        running.detach()
        stage.ask(running, "detached")
        running.flush_cache()
        running.attach(**pool)
        stage.ask(running, "attached")
        running.flush_cache()
        running.detach()
        running.attach(dram_capacity="64MiB", namespace="apart")
        stage.ask(running, "apart", FIRST + LAST)
    return stage


@pytest.fixture(scope="module")
def between(model: Path, pool: dict[str, object], first: Stage) -> dict[str, list[dict[str, Any]]]:
    """vLLM with the same model in the same folder."""
    task = {"model": str(model), "pool": pool, "prompts": FIRST, "max_tokens": MAX_TOKENS}
    answer: dict[str, list[dict[str, Any]]] = drive("vllm_on_pool", task, VLLM_PYTHON, **vllm_environment())
    return answer


@pytest.fixture(scope="module")
def second(
    model: Path,
    pool: dict[str, object],
    first: Stage,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stage:
    """``sglang serve`` after a restart; killed while it writes."""
    if VLLM_PYTHON:
        request.getfixturevalue("between")
    stage = Stage()
    with server(model, tmp_path_factory.mktemp("second"), *extra_config(**pool), launcher=SERVE) as running:
        stage.ask(running, "restarted")
        with ThreadPoolExecutor(len(LAST)) as clients:
            asked = [clients.submit(ask_in_vain, running, question) for question in LAST]
            running.wait_until_stored(PAGES)
            running.kill()
        stage.seen["answered in vain"] = [each.result() for each in asked]
    return stage


def ask_in_vain(running: SglangServer, question: list[int]) -> int:
    """Ask for more than the server will live to answer; how many tokens came all the same."""
    with contextlib.suppress(OSError, HTTPException, ServerFailed):
        return len(running.complete(question, max_tokens=IN_VAIN).tokens)
    return 0


@pytest.fixture(scope="module")
def third(model: Path, pool: dict[str, object], second: Stage) -> list[dict[str, Any]]:
    """``Engine`` on what the killed server left."""
    task = {"arguments": engine_arguments(model, pool), "prompts": FIRST + LAST, "max_tokens": MAX_TOKENS}
    answers: list[dict[str, Any]] = drive("engine", task)
    return answers


def test_the_pool_gives_back_what_sglang_forgot(first: Stage) -> None:
    cold, again, flushed = (first.answers[state] for state in ("cold", "again", "flushed"))
    assert [answer.cached_tokens for answer in cold] == [0, 0, 0]
    assert [answer.device for answer in again] == [WHOLE] * 3
    assert [(answer.device, answer.host, answer.storage) for answer in flushed] == [(0, 0, WHOLE)] * 3
    assert tokens(cold) == tokens(again) == tokens(flushed)
    assert len(set(tokens(cold))) == 3, "the prompts are answered differently, so that a mix-up shows"


def test_the_host_pool_lies_in_a_memfd(first: Stage) -> None:
    assert [name for name in first.seen["files"] if name.startswith("/memfd:sglang")]


def test_detached_is_computed_and_attached_again_is_found(first: Stage) -> None:
    assert [answer.storage for answer in first.answers["detached"]] == [0, 0, 0]
    assert [answer.storage for answer in first.answers["attached"]] == [WHOLE] * 3
    assert tokens(first.answers["detached"]) == tokens(first.answers["attached"]) == tokens(first.answers["cold"])


def test_another_namespace_shares_nothing(first: Stage) -> None:
    assert [answer.cached_tokens for answer in first.answers["apart"]] == [0] * len(FIRST + LAST)
    assert tokens(first.answers["apart"])[: len(FIRST)] == tokens(first.answers["cold"])


def test_a_restarted_server_finds_everything(first: Stage, second: Stage) -> None:
    assert [(answer.device, answer.storage) for answer in second.answers["restarted"]] == [(0, WHOLE)] * 3
    assert tokens(second.answers["restarted"]) == tokens(first.answers["cold"])


def test_the_kill_came_while_pages_were_written(second: Stage) -> None:
    """Pages had been stored, as was waited for, and every request was still making more."""
    assert max(second.seen["answered in vain"]) < IN_VAIN, second.seen


def test_after_a_kill_every_token_is_right(first: Stage, third: list[dict[str, Any]]) -> None:
    """The measure is what the first server computed in another namespace, where it could find nothing."""
    assert [tuple(answer["tokens"]) for answer in third] == tokens(first.answers["apart"])


def test_after_a_kill_what_was_on_the_disk_is_found(third: list[dict[str, Any]]) -> None:
    assert [answer["storage"] for answer in third[: len(FIRST)]] == [WHOLE] * 3


@needs_vllm
def test_vllm_in_the_same_folder_finds_its_own_only(between: dict[str, list[dict[str, Any]]], first: Stage) -> None:
    """vLLM computes every prompt first, then finds it; SGLang's later stages are tested as if it had not been there."""
    assert [answer["cached"] for answer in between["cold"]] == [0, 0, 0]
    assert [answer["cached"] for answer in between["again"]] == [WHOLE] * 3
    assert [answer["tokens"] for answer in between["again"]] == [answer["tokens"] for answer in between["cold"]]
    assert [tuple(answer["tokens"]) for answer in between["cold"]] == tokens(first.answers["cold"])
