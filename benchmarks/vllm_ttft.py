"""Time to first token of DRAM and SSD hits, over the engine's own prefix hit in the same run.

Serves a random model of 190 M parameters with ``vllm serve --kv-connector umbp``.  Every prompt is asked twice in a
row: once after vLLM's cache was emptied, so that it comes from DRAM, and at once again, so that it comes from vLLM
itself; a noisy neighbour hits both.  After a restart each prompt is asked twice again, and the first comes from SSD.

Two lengths are measured.  A prompt that ends with a block (2048 tokens) is the usual figure: vLLM itself never reuses
its last block, which then comes from the pool in an engine hit as well.  A prompt of one token more is the hard one:
vLLM reuses all but that token, and whatever a pool hit takes longer is what the pool costs.

A second server does the same with ``load_mode=layerwise``, for DRAM: there the step that schedules a request loads its
hit, and waits for it layer by layer.

Targets, for the first: a DRAM hit takes at most 1.1, an SSD hit at most 2.0 of the engine's own hit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from benchmarks._report import OUT, Row, ratio, write
from examples.random_model import medium_llama, prompt
from examples.serving import VllmServer, cpu_environment, cpu_only

EXTRA = "--kv-transfer-config.kv_connector_extra_config"

BLOCK_MULTIPLE = 128
"""Block sizes of all engines divide this."""

BASES = {
    "SSD hit after a restart": "engine hit after a restart",
    "DRAM hit, layer-wise": "engine hit, layer-wise",
}
"""Ways whose engine hits were measured apart from the others'."""

TARGETS = {"DRAM hit": 1.1, "SSD hit after a restart": 2.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and write the results; the exit status is 1 when a target was missed."""
    options = _parse(arguments)
    lengths = (options.tokens, options.tokens + 1)
    prompts = {
        length: [prompt(length, seed=1000 * length + seed) for seed in range(options.prompts)] for length in lengths
    }
    figures: dict[int, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="umbp-ttft-") as folder:
        server = _server(Path(folder), options, f"{EXTRA}.ssd_dir", str(Path(folder) / "ssd"))
        with server:
            for length in lengths:
                figures[length] = _from_dram(server, prompts[length])
            speed = _load_speed(server)
        with server:
            for length in lengths:
                figures[length] |= _from_ssd(server, prompts[length])
            ssd_speed = _load_speed(server)
        with _server(Path(folder), options, f"{EXTRA}.load_mode", "layerwise") as server:
            for length in lengths:
                apart = _from_dram(server, prompts[length], last_token_again=True)
                figures[length] |= {f"{way}, layer-wise": apart[way] for way in ("engine hit", "DRAM hit")}
    sections = {f"{length} prompt tokens": _rows(figures[length]) for length in lengths}
    notes = [
        f"random Llama of 190 M parameters, {options.prompts} prompts per length",
        "ratios are medians over the prompts of a hit's time over the time of the engine's own hit of the same prompt",
        f"in the engine, a load from DRAM took {speed}, a load from SSD {ssd_speed}",
        f"targets for {options.tokens} tokens: {', '.join(f'{way} at most {most}' for way, most in TARGETS.items())}",
    ]
    print(write("vllm_ttft", "Time to first token, vLLM", sections, notes, options.out))
    ratios = {str(row["way"]): row["ratio"] for row in sections[f"{options.tokens} prompt tokens"]}
    return 0 if all(ratios[way] <= most for way, most in TARGETS.items()) else 1


def _load_speed(server: VllmServer) -> str:
    """What one load took in the transfer engine, by the connector's own counters."""
    seconds = server.metric("vllm:umbp_op_seconds", direction="load")
    moved = server.metric("vllm:umbp_bytes", direction="load")
    return f"{seconds / moved * 2**30 * 1000:.0f} ms per GiB ({moved / seconds / 1e9:.1f} GB/s)"


def _from_dram(
    server: VllmServer, prompts: Sequence[list[int]], *, last_token_again: bool = False
) -> dict[str, list[float]]:
    """Cold, then in turns: DRAM hit and engine hit of every prompt."""
    server.complete(prompt(256, seed=-1), max_tokens=2)
    figures: dict[str, list[float]] = {"cold": [], "engine hit": [], "DRAM hit": []}
    for tokens in prompts:
        figures["cold"].append(_ttft(server, tokens, 0))
    for turn in range(3):
        for tokens in prompts:
            reused = min(_whole_blocks(tokens), len(tokens) - last_token_again)
            server.reset_prefix_cache()
            from_dram = _ttft(server, tokens, reused)
            from_engine = _ttft(server, tokens, reused)
            if turn:  # the first turn of each way is a warm-up
                figures["DRAM hit"].append(from_dram)
                figures["engine hit"].append(from_engine)
    server.reset_prefix_cache()
    return figures


def _from_ssd(server: VllmServer, prompts: Sequence[list[int]]) -> dict[str, list[float]]:
    """After a restart: each prompt once from SSD, and at once again from the engine."""
    server.complete(prompt(256, seed=-2), max_tokens=2)
    figures: dict[str, list[float]] = {"SSD hit after a restart": [], "engine hit after a restart": []}
    for tokens in prompts:
        figures["SSD hit after a restart"].append(_ttft(server, tokens, _whole_blocks(tokens)))
        figures["engine hit after a restart"].append(_ttft(server, tokens, _whole_blocks(tokens)))
    return figures


def _whole_blocks(tokens: Sequence[int]) -> int:
    return len(tokens) // BLOCK_MULTIPLE * BLOCK_MULTIPLE


def _ttft(server: VllmServer, tokens: Sequence[int], reused: int) -> float:
    answer = server.complete(tokens, max_tokens=2)
    if answer.cached_tokens != reused:
        raise RuntimeError(f"{answer.cached_tokens} tokens were reused instead of {reused}; see {server.log}")
    return answer.seconds_to_first_token


def _rows(figures: dict[str, list[float]]) -> list[Row]:
    rows: list[Row] = []
    for name, seconds in figures.items():
        if name in BASES.values():
            continue
        base = figures[BASES.get(name, "engine hit")]
        rows.append(
            {
                "way": name,
                "median ms": 1000 * statistics.median(seconds),
                "least ms": 1000 * min(seconds),
                "ratio": ratio(seconds, base[: len(seconds)]),
            }
        )
    return rows


def _server(folder: Path, options: argparse.Namespace, *more: str) -> VllmServer:
    arguments = ["--kv-connector", "umbp", f"{EXTRA}.dram_capacity", "3GiB", *more]
    arguments += [f"{EXTRA}.ssd_capacity", "4GiB"]
    arguments += ["--max-model-len", str(options.tokens + 128), "--max-num-seqs", "8"]
    arguments += ["--enforce-eager", "--enable-prompt-tokens-details"]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
    if cpu_only():
        environment |= cpu_environment()
    return VllmServer(medium_llama(folder / "model"), folder / "server.log", arguments, environment)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per prompt, a multiple of the block size")
    parser.add_argument("--prompts", type=int, default=5, help="prompts per length (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
