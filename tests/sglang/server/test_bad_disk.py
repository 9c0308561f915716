"""A server whose pool has a disk that is slow, down, full or stuck: hits are lost, nothing else.

The server is started with the ``dynamic`` form, which needs no hook of ours.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.serving_sglang import PAGE_TOKENS, SglangServer
from tests.sglang.server.servers import MAX_TOKENS, PAGES, prompts, server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PLUGIN = Path(__file__).parent / "bad_disk"
WHOLE = PAGES * PAGE_TOKENS
QUESTIONS = prompts(0, 4)
CALL_TIMEOUT_MS = 500
PATIENCE_S = 60
"""A request's time at the worst: some calls of half a second, not one that waits for the disk."""


class BadDiskServer:
    """A running server, the word that its disk obeys, and what it answered when all was well."""

    def __init__(self, running: SglangServer, word: Path) -> None:
        self.running = running
        self.word = word
        self.cold: list[tuple[int, ...]] = []

    def turn(self, state: str) -> None:
        """Change the disk's behaviour."""
        self.word.write_text(state)

    def ask(self) -> list[int]:
        """Ask everything with SGLang's own caches empty; tokens and time must be right.  Tokens from storage."""
        self.running.flush_cache()
        found = []
        for question, tokens in zip(QUESTIONS, self.cold, strict=True):
            answer = self.running.complete(question, MAX_TOKENS)
            assert answer.tokens == tokens
            assert answer.seconds < PATIENCE_S
            found.append(answer.storage)
        return found

    def ask_until_found(self, timeout: float = 120.0) -> list[int]:
        """Ask until everything comes from the storage again, as it must when the disk is well."""
        deadline = time.monotonic() + timeout
        while (found := self.ask()) != [WHOLE] * len(QUESTIONS) and time.monotonic() < deadline:
            continue
        return found


@pytest.fixture(scope="module")
def bad_disk(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BadDiskServer]:
    """A pool whose memory holds a prompt and a half, so that the others are read from its disk."""
    folder = tmp_path_factory.mktemp("bad-disk")
    word = folder / "word"
    word.write_text("good")
    extra = {
        "backend_name": "umbp",
        "module_path": "umbp_sglang.store",
        "class_name": "UMBPStore",
        "interface_v1": 1,
        "dram_capacity": "4MiB",
        "ssd_dir": str(folder / "ssd"),
        "ssd_capacity": "64MiB",
        "call_timeout_ms": CALL_TIMEOUT_MS,
    }
    arguments = ["--hicache-storage-backend", "dynamic", "--hicache-storage-backend-extra-config", json.dumps(extra)]
    paths = os.pathsep.join([str(PLUGIN), os.environ.get("PYTHONPATH", "")])
    environment = {"BAD_DISK": str(word), "PYTHONPATH": paths, "UMBP_SGLANG_NO_HOOKS": "1"}
    with server(model, folder, *arguments, environment=environment) as running:
        made = BadDiskServer(running, word)
        made.cold = [running.complete(question, MAX_TOKENS).tokens for question in QUESTIONS]
        running.wait_until_stored(len(QUESTIONS) * PAGES)
        yield made
        made.turn("good")  # a server that is asked to stop writes what it has


def test_a_good_disk_gives_everything_back(bad_disk: BadDiskServer) -> None:
    bad_disk.turn("good")
    assert bad_disk.ask_until_found() == [WHOLE] * len(QUESTIONS)


@pytest.mark.parametrize("state", ["slow", "full", "down", "stuck"])
def test_a_bad_disk_costs_hits_only(bad_disk: BadDiskServer, state: str) -> None:
    bad_disk.turn(state)
    try:
        found = bad_disk.ask()
    finally:
        bad_disk.turn("good")
    assert set(found) <= set(range(0, WHOLE + 1, PAGE_TOKENS))
    assert bad_disk.ask_until_found() == [WHOLE] * len(QUESTIONS), "the pool serves again when the disk does"


def test_calls_that_gave_up_are_counted(bad_disk: BadDiskServer) -> None:
    bad_disk.turn("stuck")
    try:
        found = bad_disk.ask()
    finally:
        bad_disk.turn("good")
    lost = len(QUESTIONS) * WHOLE - sum(found)
    assert lost > 0, "a disk on which nothing ends must have cost something"
    assert bad_disk.running.metric("umbp_sglang_degraded") > 0
    assert bad_disk.running.metric("umbp_sglang_pages", direction="get") > 0
