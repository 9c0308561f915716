"""``Engine(hicache_storage_backend="umbp")``: KV outlives SGLang's own caches, in a script.

Run it with the Python that has SGLang; nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from examples.serving_sglang import cpu_only, restart_without_gpu

PAGE_TOKENS = 64


def main() -> None:
    """Generate once cold and once from the pool, and print both times."""
    restart_without_gpu()
    import sglang

    from examples.random_model import medium_llama, prompt

    with tempfile.TemporaryDirectory() as folder:
        engine = sglang.Engine(
            model_path=str(medium_llama(Path(folder))),
            page_size=PAGE_TOKENS,
            max_total_tokens=8192,
            enable_hierarchical_cache=True,
            hicache_storage_backend="umbp",
            hicache_storage_backend_extra_config=json.dumps({"dram_capacity": "1GiB"}),
            hicache_storage_prefetch_policy="wait_complete",
            **(_cpu_arguments() if cpu_only() else {}),
        )
        try:
            _ask_twice(engine, prompt(1500, seed=0))
        finally:
            engine.shutdown()


def _ask_twice(engine: Any, question: list[int]) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    for name in ("computed", "from the pool"):
        begin = time.perf_counter()
        output = engine.generate(input_ids=question, sampling_params=greedy)
        seconds = time.perf_counter() - begin
        reused = output["meta_info"]["cached_tokens"]
        print(f"{name}: {reused} tokens reused, {seconds:.2f} s, {output['output_ids']}")
        time.sleep(2)  # SGLang writes to its storage in the background; then it forgets its own copies
        engine.flush_cache()


def _cpu_arguments() -> dict[str, object]:
    """What an engine without a GPU needs besides the environment."""
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_cuda_graph": True,
        "dtype": "float32",  # rounding cannot decide a token then
    }


if __name__ == "__main__":
    main()
