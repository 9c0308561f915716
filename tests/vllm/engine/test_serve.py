"""The real ``vllm serve`` over HTTP: flags, hits, metrics, and the demo's own checks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from examples.serving import Answer, VllmServer, cpu_environment
from tests.connectors.waiting import until
from tests.vllm.engine.local import BLOCK, Ask
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt
from umbp_connectors.pool.inspection import find_catalogues

EXTRA = "--kv-transfer-config.kv_connector_extra_config"

COMMON = ["--enforce-eager", "--dtype", "float32", "--block-size", str(BLOCK), "--max-model-len", "1024"]
COMMON += ["--max-num-seqs", "8", "--enable-prompt-tokens-details"]

MakeServer = Callable[..., VllmServer]


@pytest.fixture
def make_server(llama: Path, tmp_path: Path) -> MakeServer:
    """Makes a server of the tiny Llama with these flags and environment; the test starts it."""

    def make(*arguments: str, **environment: str) -> VllmServer:
        everything = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "UMBP_DRAM_PREFAULT": "false",
            **cpu_environment(),
            **environment,
        }
        return VllmServer(llama, tmp_path / "server.log", [*arguments, *COMMON], everything)

    return make


def recorded(folder: Path) -> int:
    """How many objects a restart would find."""
    return sum(len(catalogue.objects()) for catalogue in find_catalogues(folder))


@pytest.mark.slow
def test_kv_connector_flag_end_to_end(make_server: MakeServer, oracle: Oracle, llama: Path, tmp_path: Path) -> None:
    """Cold, engine hit, DRAM hit; a restart after SIGKILL; SSD hit; the numbers in ``/metrics`` say the same."""
    texts = [prompt(300, seed=seed) for seed in range(3)]
    right = [reply.tokens for reply in oracle.ask(llama, *[Ask(text) for text in texts])]
    server = make_server(
        "--kv-connector", "umbp", f"{EXTRA}.dram_capacity", "64MiB",
        f"{EXTRA}.ssd_dir", str(tmp_path / "ssd"), f"{EXTRA}.ssd_capacity", "64MiB",
    )  # fmt: skip

    def ask() -> list[Answer]:
        return [server.complete(text, max_tokens=12) for text in texts]

    with server:
        cold = ask()
        server.reset_prefix_cache()
        from_dram = ask()
        assert server.metric("vllm:prompt_tokens_cached_by_source", source="host") == 3 * 288
        assert server.metric("vllm:external_prefix_cache_hits") == 3 * 288
        assert server.metric("vllm:umbp_hit_tokens", tier="dram") == 3 * 288
        server.wait_for_metric("vllm:umbp_stored_blocks", 27, tier="ssd")
        assert server.metric("vllm:umbp_bytes", direction="store") >= 27 * BLOCK * 2048
        assert server.metric("vllm:umbp_failed_blocks") == 0
        until(lambda: recorded(tmp_path / "ssd") >= 27)
        server.kill()
    with server:
        from_ssd = ask()
        assert server.metric("vllm:prompt_tokens_cached_by_source", source="disk") == 3 * 288
    for answers in (cold, from_dram, from_ssd):
        assert [answer.tokens for answer in answers] == right
    assert [answer.cached_tokens for answer in from_dram] == [288] * 3
    assert [answer.cached_tokens for answer in from_ssd] == [288] * 3
    assert "Traceback" not in server.log.read_text()


def dumped(folder: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """What ``umbp debug dump`` says of the engines whose temporary folder this is, by door."""
    command = [sys.executable, "-c", "from umbp_connectors.cli import main; main()", "debug", "dump", "--json"]
    environment = {**os.environ, "TMPDIR": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return {answer["door"]: answer for answer in json.loads(done.stdout)}


def shows(leader: dict[str, Any], *, taken: str, life: str) -> bool:
    """Whether this is a snapshot of that kind with one request, which is there."""
    return leader["taken"] == taken and [request["life"] for request in leader["requests"]] == [life]


@pytest.mark.slow
@pytest.mark.statement("connector", 94)
def test_a_dump_of_a_live_server(make_server: MakeServer) -> None:
    """Busy and idle, both halves of an engine say what they are doing; when it has ended, its doors are gone."""
    with tempfile.TemporaryDirectory(prefix="umbp-") as folder, ThreadPoolExecutor(1) as client:
        with make_server("--kv-connector", "umbp", f"{EXTRA}.dram_capacity", "64MiB", TMPDIR=folder) as server:
            over = threading.Event()

            def keep_busy() -> None:
                while not over.is_set():
                    server.complete(prompt(40, seed=1), max_tokens=900)

            running, busy = client.submit(keep_busy), {}

            def is_shown_busy() -> bool:
                busy.update(dumped(folder))
                return shows(busy["vllm-leader"], taken="between two steps", life="DECODING")

            with contextlib.ExitStack() as ending:
                ending.callback(over.set)
                until(is_shown_busy)
            assert busy["vllm-leader"]["failures"] == {}
            assert busy["vllm-leader"]["tiers"][0]["pages"] == (64 << 20) // (64 << 10)
            assert busy["vllm-rank0"]["rank"] == 0
            running.result(240)
            idle = dumped(folder, "--stacks")["vllm-leader"]
            assert idle["requests"] == []
            assert any(name.startswith("MainThread") for name in idle["threads"])
        assert dumped(folder) == {}


@pytest.mark.slow
def test_kv_offloading_backend_flag(make_server: MakeServer, oracle: Oracle, llama: Path) -> None:
    text = prompt(200, seed=20)
    (right,) = oracle.ask(llama, Ask(text))
    with make_server("--kv-offloading-backend", "umbp", "--kv-offloading-size", "0.0625") as server:
        cold = server.complete(text, max_tokens=12)
        server.reset_prefix_cache()
        hit = server.complete(text, max_tokens=12)
    assert cold.tokens == hit.tokens == right.tokens
    assert (cold.cached_tokens, hit.cached_tokens) == (0, 192)
