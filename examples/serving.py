"""A ``vllm serve`` subprocess and a client for it that measures: what the demo, benchmarks and tests share.

Standard library only; the Python that runs vLLM may be another one than the Python that imports this.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from examples.server_process import MODEL_NAME, Answer, EngineServer, ServerFailed

__all__ = ["MODEL_NAME", "Answer", "ServerFailed", "VllmServer", "cpu_environment", "cpu_only"]


@final
@dataclass
class VllmServer(EngineServer):
    """``vllm serve``; use as a context manager (see :class:`EngineServer`)."""

    def command(self) -> list[str]:
        """The command line up to the caller's own arguments."""
        serve = [self.python, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)]
        return [*serve, "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", MODEL_NAME]

    def complete(self, prompt: Sequence[int], max_tokens: int = 16, **settings: Any) -> Answer:
        """Complete ``prompt`` (token ids) greedily; ``settings`` are further fields of the request."""
        body = {
            "model": MODEL_NAME,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "logprobs": 5,
            **settings,
        }
        tokens: list[int] = []
        choices: list[dict[int, float]] = []
        first = 0.0
        cached = 0
        begin = time.perf_counter()
        for event in self.events("/v1/completions", body):
            for choice in event.get("choices", ()):
                if choice.get("token_ids"):
                    first = first or time.perf_counter() - begin
                    tokens += choice["token_ids"]
                    choices += map(_candidates, choice["logprobs"]["top_logprobs"])
            details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens") or cached
        return Answer(tuple(tokens), tuple(choices), first, time.perf_counter() - begin, cached)

    def reset_prefix_cache(self, timeout: float = 60.0) -> None:
        """Empty the engine's own prefix cache, not the pool.

        vLLM refuses as long as a block is in use; a store in flight is a use, so that this also waits until what
        was computed is in the pool.  Raises ``TimeoutError``.
        """
        deadline = time.monotonic() + timeout
        while not self.post("/reset_prefix_cache").get("success"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"blocks of the prefix cache are still in use after {timeout:g} s; see {self.log}")
            time.sleep(0.05)


def cpu_environment(kv_cache_gib: int = 1) -> dict[str, str]:
    """What a CPU engine on a small machine should be started with; what the user has set stays.

    More than one OpenMP thread on a machine that is not idle spins more than it computes.
    """
    wanted = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def cpu_only() -> bool:
    """Whether the vLLM of this Python runs on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _candidates(logprobs: Mapping[str, float]) -> dict[int, float]:
    return {int(name.removeprefix("token_id:")): value for name, value in logprobs.items()}
