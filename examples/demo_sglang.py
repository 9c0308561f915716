"""A long prompt whose KV has left SGLang comes back from the pool: from DRAM, and after a restart from SSD.

Serves a random model of 190 M parameters with the real ``sglang.launch_server --hicache-storage-backend umbp`` and asks
it the same prompts four times over its HTTP API:

1. *cold*: nothing is known, the whole prompt is computed;
2. *L1 hit*: SGLang still holds the tokens on the device;
3. *L3 hit, DRAM*: SGLang's device and host caches were flushed, the pages come from the pool's memory;
4. *L3 hit, SSD*: the server was stopped and started again, the pages come from the pool's folder.

Run it with the Python that has SGLang: ``python examples/demo_sglang.py``, or ``make demo-sglang``.  Nothing is
downloaded and nothing is left behind.  The exit status is 1 when a token differs or a phase reused nothing.
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
from examples.serving_sglang import (
    PAGE_TOKENS,
    PAGES,
    SglangAnswer,
    SglangServer,
    cpu_arguments,
    cpu_environment,
    cpu_only,
    extra_config,
    restart_without_gpu,
)

COLD, DEVICE, DRAM, SSD = "cold", "L1 hit", "L3 hit, DRAM", "L3 hit, SSD after restart"
TIERS = {DRAM: "dram", SSD: "ssd"}
"""Where the pool itself must say that the pages of a phase came from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = options_of(__doc__, arguments)
    restart_without_gpu()
    on_cpu = cpu_only()
    tie = 0.0 if on_cpu else GPU_TIE
    return show(
        lambda folder, screen: run(options, folder, screen, on_cpu),
        lambda phases: _table(phases, options.tokens, tie),
        lambda phases: faults_of(phases, tie),
    )


def run(options: argparse.Namespace, folder: Path, screen: Console, on_cpu: bool) -> list[Phase[SglangAnswer]]:
    """Measure all phases; ``folder`` takes the model, the pool's SSD folder and the log."""
    from examples.random_model import medium_llama, prompt  # not before the environment is right

    prompts = [prompt(options.tokens, seed=seed) for seed in range(options.prompts)]
    with progress(screen, 4 * len(prompts) + 3) as tell:
        tell("making a random model")
        server = _server(medium_llama(folder / "model"), folder, options, on_cpu)
        tell("starting SGLang (up to a minute)")
        with server:
            # The first request pays for the set-up, page hash included.
            server.complete(prompt(512, seed=-1), max_tokens=2)
            phases = [_measure(COLD, server, prompts, options, tell), _measure(DEVICE, server, prompts, options, tell)]
            server.wait_until_stored((len(prompts) * options.tokens + 512) // PAGE_TOKENS)
            server.flush_cache()
            phases.append(_measure(DRAM, server, prompts, options, tell))
            tell("stopping and starting SGLang (up to a minute)")
        with server:
            server.complete(prompt(512, seed=-2), max_tokens=2)
            phases.append(_measure(SSD, server, prompts, options, tell))
    return phases


def faults_of(phases: Sequence[Phase[SglangAnswer]], tie: float) -> list[str]:
    """What must not be: tokens that differ from the cold ones, or a phase that reused nothing from where it should."""
    source: dict[str, Callable[[SglangAnswer], int]] = {
        DEVICE: lambda answer: answer.device,
        DRAM: lambda answer: answer.storage,
        SSD: lambda answer: answer.storage,
    }
    faults = []
    for phase in phases:
        if not phase.agrees(phases[0], tie):
            faults.append(f"{phase.name}: the tokens differ from those of the cold run")
        if phase.name in source and min(map(source[phase.name], phase.answers)) == 0:
            faults.append(f"{phase.name}: at least one prompt was computed again instead of reused")
        if phase.name in TIERS and not phase.from_source:
            faults.append(f"{phase.name}: no page came from {TIERS[phase.name]}")
    return faults


def _server(model: Path, folder: Path, options: argparse.Namespace, on_cpu: bool) -> SglangServer:
    arguments = extra_config(dram_capacity="2GiB", ssd_dir=folder / "ssd", ssd_capacity="4GiB")
    arguments += ["--hicache-storage-prefetch-policy", "wait_complete"]
    longest = options.tokens + options.max_tokens + 128
    arguments += ["--context-length", str(longest), "--max-total-tokens", str((options.prompts + 1) * longest)]
    arguments += ["--max-running-requests", "4"]
    environment = {"HF_HUB_OFFLINE": "1"}
    if on_cpu:
        # Rounding cannot decide a token in 32 bits, so that equal means equal.
        arguments += [*cpu_arguments(), "--dtype", "float32"]
        environment |= cpu_environment()
    else:
        arguments += ["--mem-fraction-static", "0.5"]
    return SglangServer(model, folder / "server.log", arguments, environment)


def _measure(
    name: str,
    server: SglangServer,
    prompts: Sequence[list[int]],
    options: argparse.Namespace,
    tell: Callable[[str], None],
) -> Phase[SglangAnswer]:
    tier = {"direction": "get", "result": TIERS.get(name, "")}
    before = server.metric(PAGES, **tier)
    answers = ask_all(name, prompts, lambda tokens: server.complete(tokens, options.max_tokens), tell)
    return Phase(name, answers, round(server.metric(PAGES, **tier) - before))


def _table(phases: Sequence[Phase[SglangAnswer]], tokens: int, tie: float) -> Table:
    caption = "tokens by SGLang's cached_tokens_details, pages by the pool's own metrics"
    table = table_of(phases, tokens, caption, ("device\n(L1)", "storage\n(L3)", "pages\nfrom"))
    for phase in phases:
        device = str(phase.median(lambda answer: answer.device))
        storage = str(phase.median(lambda answer: answer.storage))
        pages = f"{phase.from_source} {TIERS[phase.name]}" if phase.name in TIERS else "-"
        add_row(table, phase, phases[0], tie, device, storage, pages)
    return table


if __name__ == "__main__":
    sys.exit(main())
