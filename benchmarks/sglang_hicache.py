"""Speed of the pool as SGLang's L3 storage: SGLang's own controller functions, a real host pool, no server.

``python benchmarks/sglang_hicache.py [--quick] [--out FOLDER] [--file-dir FOLDER]``, with the Python that has SGLang.

Pages of 64 KiB to 4 MiB, 128 per call as the controller's threads ask for them, are put and got by this pool and by
SGLang's ``file`` backend in turns, and one thread just copies the same pieces of the same pages in between: the
ceiling.  ``file`` works in shared memory (a folder of a disk would be slower).  Every way is checked: what comes back
is compared with what was put.  A second table has the host layouts, a third the question how long a prefix there is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from benchmarks._report import OUT, Row, write
from examples.serving_sglang import restart_without_gpu

PAGES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
LAYOUTS = ("page_first", "page_first_direct", "page_head", "layer_first")
TARGET_RATIO = 0.8
TARGET_EXISTS_US = {128: 60.0, 2048: 500.0}
SMALL_PAGES = ("64 KiB",)
"""Pages that no target is set for."""
SHARED_MEMORY = Path("/dev/shm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write the results; the exit status is 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, small pages only")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results (default: %(default)s)")
    parser.add_argument("--file-dir", type=Path, default=None, help="where the file backend works (default: memory)")
    options = parser.parse_args(arguments)
    restart_without_gpu()
    sections = measured(3 if options.quick else 9, PAGES[:2] if options.quick else PAGES, options.file_dir)
    sizes, _, lookups = sections.values()
    faults = missed(sizes, lookups)
    limits = " and ".join(f"{most:.0f} us for {keys} keys" for keys, most in TARGET_EXISTS_US.items())
    notes = [
        f"Targets: put and get {TARGET_RATIO} of the copy from 256 KiB pages on; exists at most {limits}.",
        "Missed: " + ("; ".join(faults) or "none"),
        "SGLang's `_page_backup`, `_page_transfer`, `batch_exists` on its host pool, pages of 64 tokens.",
        "The copy moves the same pieces of the same pages between host pool and other memory, with one thread.",
        "Medians of interleaved rounds; ratios are medians of each round's ratio.",
        "Core seconds count all threads of the process: they say most on a machine that others use too.",
        "The pool copies with two threads.  Where the kernel puts both on one core, the rate falls to that of one.",
        "This pool verifies every page (xxh3-128); the copies and the file backend do not.",
    ]
    print(write("sglang", "SGLang's L3 storage", sections, notes, options.out))
    return 1 if faults else 0


def measured(count: int, page_sizes: Sequence[int], file_dir: Path | None) -> dict[str, list[Row]]:
    """Every table."""
    from sglang.srt.plugins import load_plugins

    from benchmarks import sglang_ways as ways

    load_plugins()
    shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="umbp-bench-", dir=file_dir or shared) as folder:
        return {
            "put and get of 128 pages, page_first": ways.by_size(page_sizes, count, Path(folder)),
            "put and get of 128 pages of 1 MiB, by host layout": ways.by_layout(LAYOUTS, count),
            "exists, one call for a whole chain": ways.exists(count, Path(folder) / "exists"),
        }


def missed(sizes: Sequence[Row], lookups: Sequence[Row]) -> list[str]:
    """The targets that were not reached, in words."""
    found = []
    for row in sizes:
        for what in ("put", "get"):
            reached = row[f"{what} of copy"]
            if row["backend"] == "umbp" and row["page"] not in SMALL_PAGES and float(str(reached)) < TARGET_RATIO:
                found.append(f"{what} of {row['page']} pages: {reached:.2f} of the copy instead of {TARGET_RATIO}")
    for row in lookups:
        most = TARGET_EXISTS_US[int(str(row["keys"]))]
        if row["backend"] == "umbp" and float(str(row["p50 us"])) > most:
            found.append(f"exists of {row['keys']} keys ({row['which']}): {row['p50 us']:.0f} us instead of {most:.0f}")
    return found


if __name__ == "__main__":
    sys.exit(main())
