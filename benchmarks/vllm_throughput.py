"""What the connector costs where it cannot help: requests per second with it and no hit, over without it.

Two ``vllm serve`` of the same random model, one with ``--kv-connector umbp`` and both tiers and one without, get the
same load in turns: prompts that never repeat, so that every block is stored and none is ever loaded.  Beside the
requests per second stands the processor time per request of all processes of a server, which a neighbour that takes
the processor away changes less.

Target: at least 0.98 of the requests per second without it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

import psutil

from benchmarks._report import OUT, Row, ratio, rounds, write
from examples.random_model import medium_llama, prompt
from examples.serving import VllmServer, cpu_environment, cpu_only

EXTRA = "--kv-transfer-config.kv_connector_extra_config"

OFF, ON = "connector off", "connector on"

TARGET = 0.98


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and write the results; the exit status is 1 when the target was missed."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="umbp-throughput-") as name, ExitStack() as stack:
        folder = Path(name)
        model = medium_llama(folder / "model")
        tiers = [f"{EXTRA}.ssd_dir", str(folder / "ssd"), f"{EXTRA}.dram_capacity", "2GiB"]
        tiers += [f"{EXTRA}.ssd_capacity", "4GiB"]
        on = stack.enter_context(_server(model, folder / "on.log", ["--kv-connector", "umbp", *tiers], options))
        off = stack.enter_context(_server(model, folder / "off.log", [], options))
        seeds = itertools.count()
        work: dict[str, list[float]] = {OFF: [], ON: []}
        figures = rounds(
            {OFF: _load(off, seeds, options, work[OFF]), ON: _load(on, seeds, options, work[ON])}, options.rounds
        )
        hits = on.metric("vllm:external_prefix_cache_hits")
        stored = on.metric("vllm:umbp_stored_blocks", tier="dram")
    share = ratio(figures[ON], figures[OFF])
    rows: list[Row] = [
        {
            "way": name,
            "requests/s, median": statistics.median(rates),
            "best": max(rates),
            "ratio": ratio(rates, figures[OFF]),
            "processor s per request": statistics.median(work[name][1:]),
            "its ratio": ratio(work[name][1:], work[OFF][1:]),
        }
        for name, rates in figures.items()
    ]
    notes = [
        f"per round {options.requests} requests, {options.parallel} at a time; {options.rounds} rounds in turns",
        f"{options.tokens} prompt and {options.max_tokens} output tokens per request, random Llama of 190 M parameters",
        f"blocks stored {stored:.0f}, tokens hit {hits:.0f}",
        f"target: at least {TARGET}",
    ]
    print(write("vllm_throughput", "Throughput without hits, vLLM", {"Requests per second": rows}, notes, options.out))
    return 0 if share >= TARGET and not hits and stored else 1


def _load(
    server: VllmServer, seeds: Iterator[int], options: argparse.Namespace, work: list[float]
) -> Callable[[], float]:
    """A round against ``server``: returns requests per second and appends processor seconds per request to ``work``."""

    def run() -> float:
        texts = [prompt(options.tokens, seed=next(seeds)) for _ in range(options.requests)]
        used = _processor_seconds(server)
        with ThreadPoolExecutor(options.parallel) as pool:
            begin = time.perf_counter()
            list(pool.map(lambda text: server.complete(text, options.max_tokens), texts))
            seconds = time.perf_counter() - begin
        work.append((_processor_seconds(server) - used) / len(texts))
        return len(texts) / seconds

    return run


def _processor_seconds(server: VllmServer) -> float:
    """User and system time of all processes of ``server`` so far."""
    if server.process is None:
        return 0.0
    root = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(used.user + used.system for used in times)


def _server(model: Path, log: Path, flags: Sequence[str], options: argparse.Namespace) -> VllmServer:
    arguments = [*flags, "--max-model-len", str(options.tokens + options.max_tokens), "--enforce-eager"]
    arguments += ["--max-num-seqs", str(options.parallel)]
    environment = {"HF_HUB_OFFLINE": "1"}
    if cpu_only():
        environment |= cpu_environment()
    else:
        arguments += ["--gpu-memory-utilization", "0.3"]
    return VllmServer(model, log, arguments, environment)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16, help="output tokens (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=8, help="requests per round (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=4, help="requests at a time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of both ways (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
