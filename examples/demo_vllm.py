"""A long prompt whose KV has left vLLM comes back from the pool: from DRAM, and after a restart from SSD.

Serves a random model of 190 M parameters with the real ``vllm serve --kv-connector umbp`` and asks it the same prompts
four times over its HTTP API:

1. *cold*: nothing is known, the whole prompt is computed;
2. *engine prefix hit*: vLLM still holds the blocks itself;
3. *DRAM hit*: vLLM's prefix cache was emptied, the blocks come from the pool's memory;
4. *SSD hit*: the server was stopped and started again, the blocks come from the pool's folder.

Run it with the Python that has vLLM: ``python examples/demo_vllm.py``, or ``make demo``.  Nothing is downloaded and
nothing is left behind.  The exit status is 1 when a token differs or a phase reused nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from rich.console import Console
from rich.table import Table

from examples.demo_phases import GPU_TIE, Phase, add_row, ask_all, options_of, show, table_of
from examples.progress import progress
from examples.random_model import medium_llama, prompt
from examples.serving import Answer, VllmServer, cpu_environment, cpu_only

COLD, ENGINE, DRAM, SSD = "cold", "engine prefix hit", "DRAM hit", "SSD hit after restart"
CACHED = "vllm:prompt_tokens_cached_by_source"
SOURCES = {COLD: None, ENGINE: "device", DRAM: "host", SSD: "disk"}
"""Where vLLM itself must say that the reused tokens of a phase came from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = options_of(__doc__, arguments)
    on_cpu = cpu_only()
    tie = 0.0 if on_cpu else GPU_TIE
    return show(
        lambda folder, screen: run(options, folder, screen, on_cpu),
        lambda phases: _table(phases, options.tokens, tie),
        lambda phases: faults_of(phases, tie),
    )


def run(options: argparse.Namespace, folder: Path, screen: Console, on_cpu: bool) -> list[Phase[Answer]]:
    """Measure all phases; ``folder`` takes the model, the pool's SSD folder and the log."""
    prompts = [prompt(options.tokens, seed=seed) for seed in range(options.prompts)]
    with progress(screen, 4 * len(prompts) + 3) as tell:
        tell("making a random model")
        server = _server(medium_llama(folder / "model"), folder, options, on_cpu)
        tell("starting vllm serve (up to a minute)")
        with server:
            server.complete(prompt(256, seed=-1), max_tokens=2)  # the first request of a server pays for its set-up
            phases = [_measure(COLD, server, prompts, options, tell), _measure(ENGINE, server, prompts, options, tell)]
            server.reset_prefix_cache()
            phases.append(_measure(DRAM, server, prompts, options, tell))
            tell("stopping and starting vllm serve (up to a minute)")
        with server:
            server.complete(prompt(256, seed=-2), max_tokens=2)
            phases.append(_measure(SSD, server, prompts, options, tell))
    return phases


def faults_of(phases: Sequence[Phase[Answer]], tie: float) -> list[str]:
    """What must not be: tokens that differ from the cold ones, or a phase that reused nothing."""
    faults = []
    for phase in phases:
        if not phase.agrees(phases[0], tie):
            faults.append(f"{phase.name}: the tokens differ from those of the cold run")
        if SOURCES[phase.name] is not None and (
            min(a.cached_tokens for a in phase.answers) == 0 or not phase.from_source
        ):
            faults.append(f"{phase.name}: at least one prompt was computed again instead of reused")
    return faults


def _server(model: Path, folder: Path, options: argparse.Namespace, on_cpu: bool) -> VllmServer:
    extra = "--kv-transfer-config.kv_connector_extra_config"
    arguments = ["--kv-connector", "umbp", f"{extra}.dram_capacity", "2GiB"]
    arguments += [f"{extra}.ssd_dir", str(folder / "ssd"), f"{extra}.ssd_capacity", "4GiB"]
    arguments += ["--max-model-len", str(options.tokens + options.max_tokens + 128), "--max-num-seqs", "8"]
    arguments += ["--enforce-eager", "--enable-prompt-tokens-details"]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}  # the first: for POST /reset_prefix_cache
    if on_cpu:
        arguments += ["--dtype", "float32"]  # rounding then cannot decide a token, so that equal means equal
        environment |= cpu_environment()
    else:
        arguments += ["--gpu-memory-utilization", "0.3"]
    return VllmServer(model, folder / "server.log", arguments, environment)


def _measure(
    name: str,
    server: VllmServer,
    prompts: Sequence[list[int]],
    options: argparse.Namespace,
    tell: Callable[[str], None],
) -> Phase[Answer]:
    source = SOURCES[name]
    before = server.metric(CACHED, source=source) if source else 0
    answers = ask_all(name, prompts, lambda tokens: server.complete(tokens, options.max_tokens), tell)
    after = server.metric(CACHED, source=source) if source else 0
    return Phase(name, answers, round(after - before))


def _table(phases: Sequence[Phase[Answer]], tokens: int, tie: float) -> Table:
    caption = "by vLLM's metrics: tokens of all prompts, and where from"
    table = table_of(phases, tokens, caption, ("tokens\nreused", "by vLLM's\nmetrics"))
    for phase in phases:
        source = SOURCES[phase.name]
        reused = str(phase.median(lambda answer: answer.cached_tokens))
        add_row(table, phase, phases[0], tie, reused, f"{phase.from_source} {source}" if source else "-")
    return table


if __name__ == "__main__":
    sys.exit(main())
