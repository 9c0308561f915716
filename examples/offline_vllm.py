"""``LLM(model, kv_connector="umbp")``: KV blocks outlive vLLM's own prefix cache, in a script.

Run it with the Python that has vLLM; nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from any folder

from examples.random_model import medium_llama, prompt
from examples.serving import cpu_environment, cpu_only


def main() -> None:
    """Generate once cold and once from the pool, and print both times."""
    on_cpu = cpu_only()
    if on_cpu:
        os.environ.update(cpu_environment())  # before the engine starts
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            str(medium_llama(Path(folder))),
            kv_connector="umbp",
            dtype="float32" if on_cpu else "auto",  # rounding cannot decide a token then
            enforce_eager=True,
            max_model_len=2048,
        )
        question = {"prompt_token_ids": prompt(1500, seed=0)}
        greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        for name in ("computed", "from the pool"):
            begin = time.perf_counter()
            (output,) = llm.generate(question, greedy, use_tqdm=False)
            seconds = time.perf_counter() - begin
            print(f"{name}: {output.num_cached_tokens} tokens reused, {seconds:.2f} s, {output.outputs[0].token_ids}")
            while not llm.reset_prefix_cache():  # vLLM forgets; false as long as a store still reads its blocks
                time.sleep(0.05)


if __name__ == "__main__":
    main()
