"""Time to first token of conversations over two vLLM engines: the router's choice against round robin.

Serves a random model of 190 M parameters twice with ``vllm serve --kv-connector umbp``, both reporting to one ``umbp
master``, behind two routers that differ in their policy alone.  Conversations are played in rounds, in turns of the
policies, so that a noisy neighbour hits both; each round has texts of its own.  Requests go one at a time: on one small
machine two prefills at once would measure how its processors are shared.

The router's own cost is measured on short prompts whose KV is in HBM: through the router (tokens given, so that no
tokenizer is asked; and text) and past it.

Target: later turns take at most 0.7 of round robin's time to first token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from benchmarks._report import OUT, Row, write
from examples.demo_router import ROUTER_FLAGS, server_arguments, server_environment, strays
from examples.random_model import medium_llama, prompt
from examples.router_cluster import Cluster, cluster, second_router
from examples.router_load import Talk, Turn, play

IN_TURN, CHEAPEST = "round robin", "cheapest KV"
TARGET = 0.7
SHORT_TOKENS = 257
REPEATS = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and write the results; the exit status is 1 when the target was missed."""
    options = _parse(arguments)
    talk = Talk(options.conversations, options.turns, options.tokens)
    with tempfile.TemporaryDirectory(prefix="umbp-router-") as name:
        folder = Path(name)
        model = medium_llama(folder / "model")
        with cluster(model, folder, server_arguments(talk), server_environment(), ROUTER_FLAGS) as started:
            for worker in started.workers:
                worker.complete(range(256), max_tokens=2)
            with second_router(started, folder, [*ROUTER_FLAGS, "--policy", "turn"]) as in_turn:
                routers = {IN_TURN: in_turn, CHEAPEST: started.router}
                played: dict[str, list[Turn]] = {way: [] for way in routers}
                for number in range(options.rounds):
                    for position, (way, router) in enumerate(routers.items()):
                        seed = 1_000_000 * (2 * number + position + 1)
                        played[way] += play(talk, router, seed)
            own = _own_cost(started)
    rows = [_row(way, turns, talk) for way, turns in played.items()]
    ratio = _median(_later(played[CHEAPEST])) / _median(_later(played[IN_TURN]))
    load = f"{options.rounds} rounds of {talk.conversations} conversations of {talk.turns} turns"
    notes = [
        f"random Llama of 190 M parameters; {load}: {talk.first_tokens} tokens, {talk.turn_tokens} more with each turn",
        f"later turns take {ratio:.2f} of round robin's median time to first token (target: at most {TARGET})",
        "the router's own cost: the same prompt, held in HBM, in turns of the three ways",
    ]
    sections = {"Conversations": rows, "The router's own cost": own}
    print(write("router", "Router: time to first token over two engines", sections, notes, options.out))
    return 0 if ratio <= TARGET else 1


def _row(way: str, turns: Sequence[Turn], talk: Talk) -> Row:
    later = [turn for turn in turns if turn.number]
    rounds = [turns[at : at + talk.requests()] for at in range(0, len(turns), talk.requests())]
    seconds = _later(turns)
    reused = sum(t.answer.cached_tokens for t in later) / sum(t.answer.prompt_tokens for t in later)
    return {
        "policy": way,
        "first turns, median s": _median([t.answer.seconds_to_first_token for t in turns if not t.number]),
        "later turns, median s": _median(seconds),
        "p90 s": sorted(seconds)[int(0.9 * (len(seconds) - 1))],
        "tokens reused": f"{reused:.0%}",
        "where their KV was": f"{len(later) - sum(len(strays(each)) for each in rounds)} of {len(later)}",
    }


def _own_cost(started: Cluster) -> list[Row]:
    """The same short prompts past the router and through it."""
    tokens = prompt(SHORT_TOKENS, seed=7)
    text = "".join(chr(ord("a") + token % 26) for token in tokens)
    home = started.router.complete(tokens).worker
    started.router.complete(text)
    (worker,) = [each for each in started.workers if home.endswith(f":{each.port}")]
    ways: dict[str, Callable[[], float]] = {
        "past the router, tokens": lambda: worker.complete(tokens, max_tokens=2).seconds_to_first_token,
        "through it, tokens": lambda: started.router.complete(tokens, 2).seconds_to_first_token,
        "through it, text": lambda: started.router.complete(text, 2).seconds_to_first_token,
    }
    figures: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(REPEATS + 1):
        for way, ask in ways.items():
            seconds = ask()
            if turn:
                figures[way].append(seconds)
    decisions = started.router.metric("umbp_router_decision_seconds_sum")
    count = started.router.metric("umbp_router_decision_seconds_count")
    rows: list[Row] = [
        {"way": way, "median ms": 1000 * _median(each), "least ms": 1000 * min(each)} for way, each in figures.items()
    ]
    return [*rows, {"way": "a decision, mean", "median ms": 1000 * decisions / count, "least ms": "-"}]


def _later(turns: Sequence[Turn]) -> list[float]:
    return [turn.answer.seconds_to_first_token for turn in turns if turn.number]


def _median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=5, help="an odd number (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="turns of each (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1536, help="tokens of a first turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds per policy (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
