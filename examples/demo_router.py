"""Two vLLM engines that report to a master, and a router that sends each turn of a conversation where its KV is.

Serves a random model of 190 M parameters twice with the real ``vllm serve --kv-connector umbp``, starts ``umbp master``
and the router (``python -m examples.router``), and plays the same kind of conversations through it twice:

1. *round robin*: the engines take turns, so that a conversation finds its KV on the other engine half of the time;
2. *cheapest KV*: the router computes the engine's block hashes from the prompt, asks the master who holds how much of
   it on which tier, and takes the engine on which the first token would come first.

Run it with the Python that has vLLM: ``python examples/demo_router.py``, or ``make demo-router``.  Nothing is
downloaded and nothing is left behind.  The exit status is 1 when a later turn did not go where its KV was.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from rich import box
from rich.console import Console
from rich.table import Table

from examples.progress import console, progress
from examples.random_model import medium_llama
from examples.router_cluster import cluster, second_router
from examples.router_load import Talk, Turn, play
from examples.serving import cpu_environment, cpu_only

EXTRA = "--kv-transfer-config.kv_connector_extra_config"
IN_TURN, CHEAPEST = "round robin", "cheapest KV"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=3, help="an odd number (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1536, help="tokens of a first turn (default: %(default)s)")
    options = parser.parse_args(arguments)
    talk = Talk(options.conversations, options.turns, options.tokens)
    screen = console()
    with tempfile.TemporaryDirectory(prefix="umbp-demo-router-") as folder:
        played = run(talk, Path(folder), screen)
    screen.print(table_of(played))
    screen.print("why, for the last turn:", played[CHEAPEST][-1].answer.why, style="dim", highlight=False)
    strayed = strays(played[CHEAPEST])
    for turn in strayed:
        screen.print(
            f"conversation {turn.conversation + 1}, turn {turn.number + 1} strayed: {turn.answer.why}", style="red"
        )
    return 1 if strayed else 0


def run(talk: Talk, folder: Path, screen: Console) -> dict[str, list[Turn]]:
    """Play the conversations by either policy."""
    with progress(screen, 2 * talk.requests() + 3) as tell:
        tell("making a random model")
        model = medium_llama(folder / "model")
        tell("starting a master, two vLLM servers and a router (a minute or two)")
        with cluster(model, folder, server_arguments(talk), server_environment(), ROUTER_FLAGS) as started:
            tell("warming up")
            for worker in started.workers:
                worker.complete(range(256), max_tokens=2)  # the first request of a server pays for its set-up
            with second_router(started, folder, [*ROUTER_FLAGS, "--policy", "turn"]) as in_turn:
                played = {IN_TURN: list(play(talk, in_turn, seed=1_000_000, tell=tell))}
            played[CHEAPEST] = list(play(talk, started.router, seed=2_000_000, tell=tell))
    return played


ROUTER_FLAGS = ["--tokenize-timeout", "5", "--match-timeout", "1"]
"""A machine that computes two engines' prefill on its own processors answers late at times."""


def server_arguments(talk: Talk) -> list[str]:
    """For ``vllm serve``."""
    arguments = ["--kv-connector", "umbp", f"{EXTRA}.dram_capacity", "1GiB"]
    arguments += ["--max-model-len", str(talk.longest + 64), "--max-num-seqs", "8", "--enforce-eager"]
    arguments += ["--enable-prompt-tokens-details"]
    return arguments if cpu_only() else [*arguments, "--gpu-memory-utilization", "0.3"]


def server_environment() -> dict[str, str]:
    """For ``vllm serve``."""
    return {"HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1", **(cpu_environment() if cpu_only() else {})}


def strays(turns: Sequence[Turn]) -> list[Turn]:
    """Later turns that did not go to the engine that has the conversation."""
    homes = {turn.conversation: turn.answer.worker for turn in turns if turn.number == 0}
    return [turn for turn in turns if turn.answer.worker != homes[turn.conversation]]


def table_of(played: dict[str, list[Turn]]) -> Table:
    """First and later turns, by policy."""
    table = Table(
        "policy",
        "first turns:\nTTFT, s",
        "later turns:\nTTFT, s",
        "tokens\nreused",
        "turns where\ntheir KV was",
        box=box.SIMPLE,
    )
    for name, turns in played.items():
        later = [turn for turn in turns if turn.number]
        reused = sum(turn.answer.cached_tokens for turn in later) / sum(turn.answer.prompt_tokens for turn in later)
        at_home = len(later) - len(strays(turns))
        first = seconds(turn for turn in turns if turn.number == 0)
        table.add_row(name, first, seconds(later), f"{reused:.0%}", f"{at_home} of {len(later)}")
    return table


def seconds(turns: Iterable[Turn]) -> str:
    """The median time to the first token."""
    return f"{statistics.median(turn.answer.seconds_to_first_token for turn in turns):.3f}"


if __name__ == "__main__":
    sys.exit(main())
