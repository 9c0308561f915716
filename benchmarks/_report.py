"""What the benchmarks share: interleaved rounds, medians and ratios, results as JSON and a Markdown table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

OUT = Path("bench-results")
"""Where results go unless told otherwise, relative to where the benchmark is started."""

Row = dict[str, object]


def machine() -> dict[str, object]:
    """The machine, by its processor and nothing else, and what the figures depend on in software."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


def rounds(ways: Mapping[str, Callable[[], float]], count: int, back_and_forth: bool = False) -> dict[str, list[float]]:
    """Run every way ``count`` times, in turns, so that a noisy neighbour hits all of them; the first turn is a warm-up.

    Each way returns one figure.  With ``back_and_forth`` every other turn begins with the last way: where it counts
    what was in the processor's caches before, no way always follows the same one.
    """
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(count + 1):
        for name in reversed(ways) if back_and_forth and turn % 2 else ways:
            figure = ways[name]()
            if turn:
                figures[name].append(figure)
    return figures


def rate(nbytes: int, work: Callable[[], object]) -> float:
    """GB/s (10^9) of ``work``, which moves ``nbytes``."""
    start = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - start) / 1e9


def ratio(figures: Sequence[float], ceiling: Sequence[float]) -> float:
    """The median over the rounds of a figure over its round's ceiling."""
    return statistics.median(figure / most for figure, most in zip(figures, ceiling, strict=True))


def table(rows: Sequence[Row]) -> str:
    """``rows``, which have the same keys, as a Markdown table."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(_cell(row[head]) for head in heads) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(name: str, title: str, sections: Mapping[str, Sequence[Row]], notes: Sequence[str], out: Path) -> str:
    """Write ``<name>.json`` and ``<name>.md`` below ``out``; returns the Markdown."""
    host = machine()
    where = f"{host['cpu']}, {host['cores']} cores, Python {host['python']}, load average {host['load_average']}"
    text = [f"# {title}", "", where]
    for heading, rows in sections.items():
        text += ["", f"## {heading}", "", table(rows)]
    text += ["", *(f"- {note}" for note in notes), ""]
    out.mkdir(parents=True, exist_ok=True)
    document = {"machine": host, "sections": sections, "notes": list(notes)}
    (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    markdown = "\n".join(text)
    (out / f"{name}.md").write_text(markdown, encoding="utf-8")
    return markdown
