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
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from rich.console import Console
from rich.table import Table

from examples.progress import console, progress
from examples.serving_sglang import (
    PAGE_TOKENS,
    PAGES,
    ServerFailed,
    SglangAnswer,
    SglangServer,
    cpu_arguments,
    cpu_environment,
    cpu_only,
    extra_config,
    restart_without_gpu,
)

GPU_TIE = 0.5
"""Nats between two candidates that 16-bit rounding may swap; the random model's best leads by about three."""

COLD, DEVICE, DRAM, SSD = "cold", "L1 hit", "L3 hit, DRAM", "L3 hit, SSD after restart"
TIERS = {DRAM: "dram", SSD: "ssd"}
"""Where the pool itself must say that the pages of a phase came from."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase measured: an answer per prompt, and the pages that the pool says came from the tier expected."""

    name: str
    answers: tuple[SglangAnswer, ...]
    from_tier: int = 0

    @property
    def seconds(self) -> float:
        """Median time to the first token."""
        return statistics.median(answer.seconds_to_first_token for answer in self.answers)

    def median(self, level: Callable[[SglangAnswer], int]) -> int:
        """Median number of tokens of the prompt that came from a level."""
        return round(statistics.median(level(answer) for answer in self.answers))

    def agrees(self, cold: Phase, tie: float) -> bool:
        """Whether every answer is the cold run's; ``tie`` as in :meth:`Answer.agrees`."""
        return all(mine.agrees(theirs, tie) for mine, theirs in zip(cold.answers, self.answers, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parse(arguments)
    restart_without_gpu()
    screen = console()
    on_cpu = cpu_only()
    tie = 0.0 if on_cpu else GPU_TIE
    with tempfile.TemporaryDirectory(prefix="umbp-demo-") as folder:
        try:
            phases = run(options, Path(folder), screen, on_cpu)
        except (ServerFailed, TimeoutError) as error:
            screen.print(f"[red]The demo failed:[/red] {error}", highlight=False)
            return 1
    screen.print(_table(phases, options.tokens, tie))
    faults = faults_of(phases, tie)
    for fault in faults:
        screen.print(f"[red]{fault}[/red]", highlight=False)
    return 1 if faults else 0


def run(options: argparse.Namespace, folder: Path, screen: Console, on_cpu: bool) -> list[Phase]:
    """Measure all phases; ``folder`` takes the model, the pool's SSD folder and the log."""
    from examples.random_model import medium_llama, prompt  # not before the environment is right

    prompts = [prompt(options.tokens, seed=seed) for seed in range(options.prompts)]
    with progress(screen, 4 * len(prompts) + 3) as tell:
        tell("making a random model")
        server = _server(medium_llama(folder / "model"), folder, options, on_cpu)
        tell("starting SGLang (up to a minute)")
        with server:
            server.complete(
                prompt(512, seed=-1), max_tokens=2
            )  # the first request pays for the set-up, page hash included
            phases = [_measure(COLD, server, prompts, options, tell), _measure(DEVICE, server, prompts, options, tell)]
            server.wait_until_stored((len(prompts) * options.tokens + 512) // PAGE_TOKENS)
            server.flush_cache()
            phases.append(_measure(DRAM, server, prompts, options, tell))
            tell("stopping and starting SGLang (up to a minute)")
        with server:
            server.complete(prompt(512, seed=-2), max_tokens=2)
            phases.append(_measure(SSD, server, prompts, options, tell))
    return phases


def faults_of(phases: Sequence[Phase], tie: float) -> list[str]:
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
        if phase.name in TIERS and not phase.from_tier:
            faults.append(f"{phase.name}: no page came from {TIERS[phase.name]}")
    return faults


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=3, help="different prompts per phase (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens to generate (default: %(default)s)")
    return parser.parse_args(arguments)


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
) -> Phase:
    tier = {"direction": "get", "result": TIERS.get(name, "")}
    before = server.metric(PAGES, **tier)
    answers = []
    for number, tokens in enumerate(prompts, 1):
        tell(f"{name}, prompt {number} of {len(prompts)}")
        answers.append(server.complete(tokens, options.max_tokens))
    return Phase(name, tuple(answers), round(server.metric(PAGES, **tier) - before))


def _table(phases: Sequence[Phase], tokens: int, tie: float) -> Table:
    title = f"Time to first token of a {tokens}-token prompt (median of {len(phases[0].answers)} prompts)"
    table = Table(title=title, caption="tokens by SGLang's cached_tokens_details, pages by the pool's own metrics")
    table.add_column("phase", no_wrap=True)
    for heading in ("device\n(L1)", "storage\n(L3)", "pages\nfrom", "TTFT", "ratio\nto cold", "same\ntokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    cold = phases[0]
    for phase in phases:
        levels = (lambda answer: answer.device, lambda answer: answer.storage)
        table.add_row(
            phase.name,
            *(str(phase.median(level)) for level in levels),
            f"{phase.from_tier} {TIERS[phase.name]}" if phase.name in TIERS else "-",
            f"{phase.seconds * 1000:.0f} ms",
            f"{phase.seconds / cold.seconds:.3f}",
            "yes" if phase.agrees(cold, tie) else "[red]no[/red]",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
