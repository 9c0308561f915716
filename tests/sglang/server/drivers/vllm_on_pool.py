"""vLLM on a pool folder: reads ``{model, pool, prompts, max_tokens}``, answers with two lists of ``{tokens, cached}``.

Between ``cold`` and ``again``, vLLM's own cache is emptied, so that ``again`` comes from the pool.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    from vllm import LLM, SamplingParams

    task = json.load(sys.stdin)
    llm = LLM(
        model=task["model"],
        kv_connector="umbp",
        kv_transfer_config={"kv_connector_extra_config": task["pool"]},
        dtype="float32",
        max_model_len=2048,
        block_size=64,
        enforce_eager=True,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"], ignore_eos=True)
    results = {}
    for name in ("cold", "again"):
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        results[name] = [
            {"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens} for output in outputs
        ]
        deadline = time.monotonic() + 30
        while not llm.reset_prefix_cache() and time.monotonic() < deadline:
            llm.generate(prompts[:1], SamplingParams(max_tokens=1), use_tqdm=False)
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
