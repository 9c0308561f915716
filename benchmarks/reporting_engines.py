"""How soon a master knows what a served engine caches: real servers, a real master, a watch of its index.

    python benchmarks/reporting_engines.py --sglang PYTHON --vllm PYTHON [--quick] [--out FOLDER]

Each engine is served by the Python that has it, with a random model of 0.6 M parameters, and reports at its default
settings.  A plug-in (``benchmarks/stamps``) writes down when the engine itself knows that a block came to a tier; here
a watch of the master notes when the master says so.  Both read the monotonic clock of one machine.  Every prompt is
new; first they come one at a time with pauses, then from four clients without a pause.

Target: visible after at most 50 ms (p50), for HBM, DRAM and SSD alike.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from benchmarks._report import OUT, Row, write
from examples import serving, serving_sglang
from examples.router_cluster import MasterServer
from examples.server_process import EngineServer
from umbp_connectors.client.native_async import NativeAsyncClient
from umbp_connectors.client.watching import Notice, Turn, Watcher
from umbp_connectors.reporting.reporter import INTERVAL
from umbp_core.index_feed import ChangeKind
from umbp_core.tiers import Tier

TARGET_MS = 50
TOKENS = 340
"""Five pages of SGLang's, ten blocks of vLLM's, and a rest."""
ANSWER = 4
CLIENTS = 4
TIMEOUT = 60.0
STAMPS = Path(__file__).parent / "stamps"
TIERS = (Tier.HBM, Tier.DRAM, Tier.SSD)
Seen = dict[tuple[int, bytes], int]
"""Tier and hash to nanoseconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and write the results; the exit status is 1 when the target was missed."""
    options = _parse(arguments)
    serving_sglang.restart_without_gpu()  # SGLang's Python has no transformers without the shim
    counts = (12, 24) if options.quick else (120, 240)
    from examples.random_model import tiny_llama

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="umbp-visible-") as name:
        model = tiny_llama(Path(name) / "model")
        for engine, python, serve in (("SGLang", options.sglang, sglang), ("vLLM", options.vllm, vllm)):
            if python:
                folder = Path(name) / engine
                folder.mkdir()
                with (
                    MasterServer(model, folder / "master.log") as running,
                    watching(running) as watch,
                    serve(model, folder, python, running) as server,
                ):
                    rows += measured(engine, server, watch, folder, counts)
    if not rows:
        raise SystemExit("no engine: give the Python that has one with --sglang or --vllm")
    notes = [
        f"report_interval_ms {INTERVAL * 1000:.0f}: changes are told so often at most, the first after a pause at once",
        f"prompts of {TOKENS} tokens that nobody has seen; pauses: one at a time; busy: {CLIENTS} clients, no pause",
        "from the moment at which the engine's own thread has the block there until a watch of the master tells it",
        "HBM: vLLM's block pool caches it, SGLang's scheduler publishes its step; DRAM and SSD: SGLang's L2, our pool",
        "engine, master and clients share the cores",
    ]
    worst = max(float(str(row["p50 ms"])) for row in rows)
    target = {"target": f"visible after at most {TARGET_MS} ms (p50)", "measured": worst, "met": worst <= TARGET_MS}
    sections = {"Target": [target], "From event to visibility": rows}
    print(write("reporting_engines", "Reporting from served engines", sections, notes, options.out))
    return 0 if worst <= TARGET_MS else 1


def measured(engine: str, server: Any, watch: Watch, folder: Path, counts: tuple[int, int]) -> list[Row]:
    """Both loads."""
    from examples.random_model import prompt

    pause = threading.Event()
    server.complete(prompt(TOKENS, seed=1), ANSWER)
    rows: list[Row] = []
    quiet, busy = counts
    for load, count in (("pauses", quiet), ("busy", busy)):
        first = 1000 if load == "pauses" else 5000
        prompts = [prompt(TOKENS, seed=first + number) for number in range(count)]
        watch.begin()
        if load == "pauses":
            for number, each in enumerate(prompts):
                server.complete(each, ANSWER)
                pause.wait(0.02 + 0.013 * (number % 7))
        else:
            with ThreadPoolExecutor(CLIENTS) as clients:
                list(clients.map(partial(server.complete, max_tokens=ANSWER), prompts))
        pause.wait(1.0)  # what is still on its way to SSD
        rows += rows_of(engine, load, stamped(folder / "stamps", watch.begun), watch.seen)
    return rows


def rows_of(engine: str, load: str, stamps: Seen, seen: Seen) -> list[Row]:
    """A row per tier."""
    rows: list[Row] = []
    for tier in TIERS:
        took = sorted((seen[key] - at) / 1e6 for key, at in stamps.items() if key[0] == tier and key in seen)
        missed = sum(key[0] == tier and key not in seen for key in stamps)
        if not took or missed:
            raise SystemExit(f"{engine}, {load}: the watch missed {missed} blocks of {tier.name} and saw {len(took)}")
        row: Row = {"engine": engine, "load": load, "tier": tier.name, "blocks": len(took)}
        row |= {f"p{part} ms": took[len(took) * part // 100] for part in (50, 90, 99)}
        rows.append({**row, "most ms": took[-1]})
    return rows


def stamped(folder: Path, begun: int) -> Seen:
    """When blocks came to tiers for the first time since then, by the engine."""
    stamps: Seen = {}
    for file in folder.iterdir():
        for line in file.read_text(encoding="ascii").splitlines():
            tier, published, at = line.split()
            key = int(tier), published.encode()
            if int(at) >= begun:
                stamps[key] = min(int(at), stamps.get(key, int(at)))
    return stamps


@dataclass
class Watch:
    """When the master said that blocks came."""

    seen: Seen = field(default_factory=dict)
    begun: int = 0
    _following: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> None:
        """Forget what was."""
        self.seen.clear()
        self.begun = time.monotonic_ns()

    async def follow(self, connect: Callable[[], NativeAsyncClient]) -> None:
        async with aclosing(Watcher([connect], TIMEOUT).follow()) as pages:
            async for page in pages:
                now = time.monotonic_ns()
                if isinstance(page, Notice):
                    if page.turn is Turn.CONNECTED:
                        self._following.set()
                    continue
                for change in page.changes:
                    if change.kind is ChangeKind.REPORTED:
                        self.seen.update({(change.tier, each): now for each in change.hashes})

    def wait(self) -> None:
        """Until the master answers."""
        if not self._following.wait(TIMEOUT):
            raise SystemExit("the master does not answer")


@contextmanager
def watching(running: MasterServer) -> Iterator[Watch]:
    """A thread that follows the index of ``running``."""
    watch, loop = Watch(), asyncio.new_event_loop()
    task = loop.create_task(watch.follow(lambda: NativeAsyncClient(("127.0.0.1", running.native_port))))

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        watch.wait()
        yield watch
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def sglang(model: Path, folder: Path, python: str, running: MasterServer) -> EngineServer:
    """``--hicache-storage-backend umbp``, reporting to ``running``."""
    pool = serving_sglang.extra_config(**_pool(folder), master_address=running.address)
    arguments = ["--max-total-tokens", "131072", "--max-running-requests", "8", "--context-length", "2048", *pool]
    environment = _environment(folder)
    if serving_sglang.cpu_only():
        arguments += [*serving_sglang.cpu_arguments(), "--dtype", "float32"]
        environment = _environment(folder, serving_sglang.cpu_environment())
    return serving_sglang.SglangServer(model, folder / "log", arguments, environment, python)


def vllm(model: Path, folder: Path, python: str, running: MasterServer) -> EngineServer:
    """``--kv-connector umbp``, reporting to ``running``."""
    extra = "--kv-transfer-config.kv_connector_extra_config"
    pool = [part for name, value in _pool(folder).items() for part in (f"{extra}.{name}", value)]
    arguments = ["--kv-connector", "umbp", *pool, "--enforce-eager", "--dtype", "float32", "--block-size", "32"]
    arguments += ["--max-model-len", "2048", "--max-num-seqs", "8"]
    given = {"UMBP_MASTER_ADDRESS": running.address, "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": "1"}
    return serving.VllmServer(
        model, folder / "log", arguments, _environment(folder, {**serving.cpu_environment(), **given}), python
    )


def _pool(folder: Path) -> dict[str, str]:
    return {"dram_capacity": "1GiB", "ssd_dir": str(folder / "ssd"), "ssd_capacity": "2GiB"}


def _environment(folder: Path, more: dict[str, str] | None = None) -> dict[str, str]:
    """With the plug-in that writes stamps, and with SGLang's shim only where ``more`` has it."""
    (folder / "stamps").mkdir(exist_ok=True)
    given = {"HF_HUB_OFFLINE": "1", **(more or {})}
    (shim, *_) = serving_sglang.cpu_environment()["PYTHONPATH"].split(os.pathsep)
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != shim]
    paths = os.pathsep.join(filter(None, [str(STAMPS), given.get("PYTHONPATH", ""), *inherited]))
    return {**given, "BENCHMARK_STAMPS": str(folder / "stamps"), "PYTHONPATH": paths}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", metavar="PYTHON", default="", help="a Python with an SGLang")
    parser.add_argument("--vllm", metavar="PYTHON", default="", help="a Python with a vLLM")
    parser.add_argument("--quick", action="store_true", help="a few requests")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
