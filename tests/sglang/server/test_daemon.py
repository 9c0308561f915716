"""Real SGLang servers over a daemon: what a killed one left in DRAM serves the next, and a killed daemon costs hits."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from examples.serving_sglang import PAGE_TOKENS, SglangAnswer, SglangServer, extra_config
from tests.connectors.daemon.processes import daemon
from tests.connectors.waiting import until
from tests.sglang.server.servers import MAX_TOKENS, PAGES, prompts, server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

QUESTIONS = prompts(300, 3)
WHOLE = PAGES * PAGE_TOKENS


Answers = dict[str, list[SglangAnswer]]


def _ask(answers: Answers, running: SglangServer, state: str) -> None:
    answers[state] = [running.complete(each, MAX_TOKENS) for each in QUESTIONS]


def _is_served(answers: Answers, running: SglangServer) -> bool:
    running.flush_cache()
    _ask(answers, running, "served again")
    return all(answer.storage >= WHOLE for answer in answers["served again"])


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Cold; from the daemon after a kill of the server; after one of the daemon; from another daemon."""
    answers: Answers = {}
    folder = tmp_path_factory.mktemp("daemon")
    socket = folder / "run" / "daemon.sock"
    pool = extra_config(mode="daemon", daemon_socket=socket, dram_capacity="64MiB")
    with contextlib.ExitStack() as ending:
        first = daemon(socket, "--dram-capacity", "64MiB")
        ending.callback(first.kill)
        with server(model, folder, *pool) as running:
            _ask(answers, running, "cold")
            running.wait_until_stored(len(QUESTIONS) * PAGES)
            running.kill()
        with server(model, folder, *pool) as running:
            _ask(answers, running, "after the kill")
            first.kill()
            running.flush_cache()
            _ask(answers, running, "without a daemon")
            second = daemon(socket, "--dram-capacity", "64MiB")
            ending.callback(second.kill)
            until(lambda: _is_served(answers, running))
    return answers


def test_every_token_is_right_throughout(answers: Answers) -> None:
    cold = [answer.tokens for answer in answers["cold"]]
    assert {state for state, found in answers.items() if [a.tokens for a in found] != cold} == set()


def test_a_killed_server_left_its_dram_to_the_next(answers: Answers) -> None:
    assert [answer.cached_tokens for answer in answers["cold"]] == [0] * 3
    assert [answer.storage for answer in answers["after the kill"]] == [WHOLE] * 3


def test_without_the_daemon_there_are_no_hits_and_with_another_one_there_are(answers: Answers) -> None:
    assert [answer.storage for answer in answers["without a daemon"]] == [0] * 3
    assert [answer.storage for answer in answers["served again"]] == [WHOLE] * 3
