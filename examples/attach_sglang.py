"""Attach the pool to an SGLang server that runs, detach it, and attach it again: the pages are still there.

Starts a server with HiCache and without a storage backend, which computes a prompt; then the same over its HTTP API.
Run it with the Python that has SGLang; nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from examples.serving_sglang import (
    PAGE_TOKENS,
    SglangServer,
    cpu_arguments,
    cpu_environment,
    cpu_only,
    restart_without_gpu,
)

ADMIN_KEY = "a key that only the operator knows"
TOKENS = 1024


def main() -> None:
    """Show where the prompt comes from after each step."""
    restart_without_gpu()
    from examples.random_model import medium_llama, prompt

    question = prompt(TOKENS, seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = {"dram_capacity": "512MiB", "ssd_dir": folder / "ssd", "ssd_capacity": "1GiB"}
        with _server(medium_llama(folder / "model"), folder) as server:
            _ask(server, question, "without a storage")
            server.flush_cache()
            server.attach(**pool)
            _ask(server, question, "attached")
            server.wait_until_stored(TOKENS // PAGE_TOKENS)
            server.flush_cache()
            _ask(server, question, "flushed")
            server.flush_cache()
            server.detach()
            _ask(server, question, "detached")
            server.flush_cache()
            server.attach(**pool)
            _ask(server, question, "attached again")


def _ask(server: SglangServer, question: list[int], state: str) -> None:
    answer = server.complete(question, max_tokens=4)
    print(f"{state}: {answer.storage} tokens from storage, {answer.tokens}", flush=True)


def _server(model: Path, folder: Path) -> SglangServer:
    arguments = ["--max-total-tokens", "8192"]
    environment = {"HF_HUB_OFFLINE": "1"}
    if cpu_only():
        arguments += [*cpu_arguments(), "--dtype", "float32"]
        environment |= cpu_environment()
    return SglangServer(model, folder / "server.log", arguments, environment, admin_key=ADMIN_KEY)


if __name__ == "__main__":
    main()
