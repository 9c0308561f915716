"""A real engine and a real master: what the master knows is what the engine holds, also after either one was killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.master.app.master_process import MasterProcess
from tests.vllm.engine.local import Ask, Engine, engine, pool
from tests.vllm.engine.processes import children
from tests.vllm.harness.reported import FLUSH, Held, difference, held_by, known_at, reporter_of, sizes, until_known
from tests.vllm.models import prompt

BLOCK_BYTES = 64 << 10
"""One block of the tiny Llama."""
TIERS: dict[str, Any] = {"dram_capacity": 20 * BLOCK_BYTES, "ssd_capacity": 200 * BLOCK_BYTES}


def truth(opened: Engine) -> Held:
    return held_by(opened.core.scheduler, opened.leader.pool)


@contextmanager
def asking(master: MasterProcess) -> Iterator[Callable[[str], Held]]:
    client = master.native()
    try:
        yield lambda node_id: known_at(client, node_id)
    finally:
        client.close()


def check(opened: Engine, known: Callable[[str], Held], node_id: str) -> dict[str, int]:
    """The master knows the truth; how much that is per tier."""
    assert reporter_of(opened.connector).flush(FLUSH)
    held, told = truth(opened), known(node_id)
    assert told == held, difference(told, held)
    return sizes(held)


@contextmanager
def child_process(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """What ``function`` sends through the pipe that is its last argument; in the end its process is killed."""
    ours, theirs = children().Pipe(duplex=False)
    child = children().Process(target=function, args=(*arguments, theirs))
    child.start()
    theirs.close()
    try:
        assert ours.poll(200), "the engine in the child does not answer"
        yield ours.recv()
    finally:
        child.kill()
        child.join(20)


@pytest.mark.statement("connector", 90)
def test_tiers_come_and_go_at_the_master(llama: Path, tmp_path: Path) -> None:
    """Cold run, mirror, demotion, evictions, resets, and some hundred random requests, in one engine's life."""
    rng = random.Random(5)
    with MasterProcess(tmp_path) as master, asking(master) as known:
        told = {"master_address": f"umbp://{master.doors['native']}", "node_id": "n", **TIERS}
        with engine(llama, kv_transfer_config=pool(tmp_path / "ssd", **told)) as opened:
            check_phases(opened, known)
            texts = [prompt(rng.randrange(40, 330), seed=100 + seed) for seed in range(24)]
            seen = []
            for turn in range(40):
                wave = [Ask(rng.choice(texts)[: rng.randrange(33, 330)], rng.randrange(1, 8)) for _ in range(8)]
                opened.ask(*wave)
                if turn % 10 == 9:
                    opened.drain()
                    opened.llm.reset_prefix_cache()
                if turn % 4 == 3:
                    seen.append(check(opened, known, "n"))
            opened.drain()
            check(opened, known, "n")
    assert max(each["HBM"] for each in seen) > 30
    assert all(each["SSD"] > each["DRAM"] > 0 for each in seen)


def check_phases(opened: Engine, known: Callable[[str], Held]) -> None:
    assert check(opened, known, "n") == {"HBM": 0, "DRAM": 0, "SSD": 0}
    opened.add(Ask(prompt(300, seed=1)))
    opened.step()
    assert check(opened, known, "n")["HBM"] == 9, "a prompt of nine blocks, in HBM when its step is over"
    opened.run()
    opened.drain()
    assert check(opened, known, "n") == {"HBM": 9, "DRAM": 9, "SSD": 9}, "mirrored in DRAM, copied to SSD"
    for seed in range(2, 5):
        opened.ask_one(Ask(prompt(300, seed=seed)))
        opened.drain()
    assert check(opened, known, "n") == {"HBM": 36, "DRAM": 20, "SSD": 36}, "evicted from DRAM alone"
    for seed in range(5, 20):
        opened.ask_one(Ask(prompt(300, seed=seed)))
        opened.drain()
    full = check(opened, known, "n")
    assert full["HBM"] < full["SSD"] == 171, "evicted from HBM alone"
    opened.forget()
    assert check(opened, known, "n") == {**full, "HBM": 0}, "a reset of vLLM's cache is for HBM alone"
    opened.ask_one(Ask(prompt(300, seed=2)))
    opened.drain()
    assert check(opened, known, "n") == {**full, "HBM": 9}, "loaded from SSD"
    assert opened.llm.reset_prefix_cache(reset_connector=True)
    assert check(opened, known, "n") == {"HBM": 0, "DRAM": 0, "SSD": 0}


def test_kill_and_restart_of_the_engine(llama: Path, tmp_path: Path) -> None:
    """What died with the engine goes when it comes back under its name; SSD is told before any request."""
    with MasterProcess(tmp_path) as master, asking(master) as known:
        told = {"master_address": f"umbp://{master.doors['native']}", "node_id": "phoenix"}
        tiers = pool(tmp_path / "ssd", **told, **TIERS)
        with child_process(_serve_until_killed, llama, tiers) as held:
            assert sizes(held) == {"HBM": 27, "DRAM": 20, "SSD": 27}
            assert known("phoenix") == held
        with engine(llama, kv_transfer_config=tiers) as second:
            after = check(second, known, "phoenix")
            assert after == {"HBM": 0, "DRAM": 0, "SSD": 27}
            second.ask_one(Ask(prompt(300, seed=1)))
            second.drain()
            assert check(second, known, "phoenix") == {"HBM": 9, "DRAM": 9, "SSD": 27}
        assert not any(known("phoenix").values()), "it said good-bye"


def _serve_until_killed(model: Path, tiers: dict[str, Any], pipe: Connection) -> None:
    opened = Engine(model, kv_transfer_config=tiers)
    for seed in range(3):
        opened.ask_one(Ask(prompt(300, seed=seed)))
        opened.drain()
    # The catalogue is written by a thread of its own; a kill must find it written.
    opened.leader.pool.catalogue._catalogue.flush(FLUSH)
    assert reporter_of(opened.connector).flush(FLUSH)
    pipe.send(truth(opened))
    signal.pause()


def test_kill_and_restart_of_the_master(llama: Path, tmp_path: Path) -> None:
    """The engine does not notice; a master that knows nothing knows the truth within two heartbeats."""
    with MasterProcess(tmp_path) as master:
        door = master.doors["native"]
        told = {"master_address": f"umbp://{door}", "node_id": "n"}
        with engine(llama, kv_transfer_config=pool(tmp_path / "ssd", **told, **TIERS)) as opened:
            opened.ask_one(Ask(prompt(300, seed=1)))
            opened.drain()
            with asking(master) as known:
                check(opened, known, "n")
            master.end(signal.SIGKILL)
            begin = time.monotonic()
            for seed in range(2, 6):
                opened.ask_one(Ask(prompt(300, seed=seed)))
                opened.forget()
            alone = time.monotonic() - begin
            opened.ask_one(Ask(prompt(300, seed=5)))
            opened.drain()
            with MasterProcess(tmp_path, f"--native-listen={door}") as another, asking(another) as known:
                until_known(lambda: known("n"), truth(opened))
                assert sizes(truth(opened)) == {"HBM": 9, "DRAM": 20, "SSD": 45}
                assert alone < 60
                opened.ask_one(Ask(prompt(300, seed=9)))
                opened.drain()
                check(opened, known, "n")
            client_stats = reporter_of(opened.connector).stats().client
            assert client_stats.full_syncs >= 2


@pytest.mark.slow
def test_two_tensor_parallel_ranks_are_one_node(llama: Path, tmp_path: Path) -> None:
    with MasterProcess(tmp_path) as master, asking(master) as known:
        told = {"master_address": f"umbp://{master.doors['native']}"}
        tiers = pool(tmp_path / "ssd", dram_capacity="2MiB", ssd_capacity="64MiB", **told)
        with child_process(_serve_on_two_ranks, llama, tiers) as (host, pid, held):
            assert known(f"{host}:pid{pid}:dp0:pp0:tp0") == held, "a hash counts when both ranks hold their part"
            assert sizes(held) == {"HBM": 54, "DRAM": 32, "SSD": 54}


def _serve_on_two_ranks(model: Path, tiers: dict[str, Any], pipe: Connection) -> None:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    opened = Engine(model, kv_transfer_config=tiers, tensor_parallel_size=2)
    for seed in range(6):
        opened.ask_one(Ask(prompt(300, seed=seed)))
        opened.drain()
    reporter = reporter_of(opened.connector)
    assert reporter.flush(FLUSH)
    node_id = reporter.client._node_id
    pipe.send((node_id.rsplit(":", 4)[0], os.getpid(), truth(opened)))
    signal.pause()
