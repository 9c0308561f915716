"""What the demos of both engines share: their options, the phases that they measure, and how a run ends."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rich.console import Console
from rich.table import Table

from examples.progress import console
from examples.server_process import Answer, ServerFailed

GPU_TIE = 0.5
"""Nats between two candidates that 16-bit rounding may swap; the random model's best leads by about three."""

AnswerT = TypeVar("AnswerT", bound=Answer)


@dataclass(frozen=True, slots=True)
class Phase(Generic[AnswerT]):
    """What one phase measured: an answer per prompt, and how much somebody else says came from where it should."""

    name: str
    answers: tuple[AnswerT, ...]
    from_source: int = 0

    @property
    def seconds(self) -> float:
        """Median time to the first token."""
        return statistics.median(answer.seconds_to_first_token for answer in self.answers)

    def median(self, tokens: Callable[[AnswerT], int]) -> int:
        """Median of a number of tokens of the answers."""
        return round(statistics.median(tokens(answer) for answer in self.answers))

    def agrees(self, cold: Phase[AnswerT], tie: float) -> bool:
        """Whether every answer is the cold run's; ``tie`` as in :meth:`Answer.agrees`."""
        return all(mine.agrees(theirs, tie) for mine, theirs in zip(cold.answers, self.answers, strict=True))


def options_of(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options that every demo takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=3, help="different prompts per phase (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens to generate (default: %(default)s)")
    return parser.parse_args(arguments)


def ask_all(
    name: str, prompts: Sequence[list[int]], complete: Callable[[list[int]], AnswerT], tell: Callable[[str], None]
) -> tuple[AnswerT, ...]:
    """The answers to all prompts, one after the other."""

    def ask() -> Iterator[AnswerT]:
        for number, tokens in enumerate(prompts, 1):
            tell(f"{name}, prompt {number} of {len(prompts)}")
            yield complete(tokens)

    return tuple(ask())


def table_of(phases: Sequence[Phase[AnswerT]], tokens: int, caption: str, headings: Sequence[str]) -> Table:
    """An empty table with a column for the phase, one for each of ``headings``, and those of :func:`add_row`."""
    title = f"Time to first token of a {tokens}-token prompt (median of {len(phases[0].answers)} prompts)"
    table = Table(title=title, caption=caption)
    table.add_column("phase", no_wrap=True)
    for heading in (*headings, "TTFT", "ratio\nto cold", "same\ntokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def add_row(table: Table, phase: Phase[AnswerT], cold: Phase[AnswerT], tie: float, *cells: str) -> None:
    """Add ``phase`` with its own ``cells``."""
    table.add_row(
        phase.name,
        *cells,
        f"{phase.seconds * 1000:.0f} ms",
        f"{phase.seconds / cold.seconds:.3f}",
        "yes" if phase.agrees(cold, tie) else "[red]no[/red]",
    )


def show(
    measure: Callable[[Path, Console], list[Phase[AnswerT]]],
    table: Callable[[Sequence[Phase[AnswerT]]], Table],
    faults_of: Callable[[Sequence[Phase[AnswerT]]], list[str]],
) -> int:
    """Measure in a folder of its own, print the table and what went wrong; returns the exit status."""
    screen = console()
    with tempfile.TemporaryDirectory(prefix="umbp-demo-") as folder:
        try:
            phases = measure(Path(folder), screen)
        except (ServerFailed, TimeoutError) as error:
            screen.print(f"[red]The demo failed:[/red] {error}", highlight=False)
            return 1
    screen.print(table(phases))
    faults = faults_of(phases)
    for fault in faults:
        screen.print(f"[red]{fault}[/red]", highlight=False)
    return 1 if faults else 0
