"""vLLM that answers line by line: reads ``{model, pool}``, says ``ready``, then answers each ``{prompts, max_tokens}``.

An answer is a list of ``{tokens, cached}``.  Before each, vLLM's own cache is emptied, so that hits are the pool's.  It
ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def forget(llm: Any, sampling: Any, prompt: list[int]) -> None:
    """Empty vLLM's own cache, as soon as nothing is being stored."""
    deadline = time.monotonic() + 30
    while not llm.reset_prefix_cache() and time.monotonic() < deadline:
        llm.generate([{"prompt_token_ids": prompt[:1]}], sampling, use_tqdm=False)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    task = json.loads(sys.stdin.readline())
    llm = LLM(
        model=task["model"],
        kv_connector="umbp",
        kv_transfer_config={"kv_connector_extra_config": task["pool"]},
        dtype="float32",
        max_model_len=2048,
        block_size=64,
        enforce_eager=True,
    )
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
        forget(llm, SamplingParams(max_tokens=1), asked["prompts"][0])
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        found = [{"tokens": list(each.outputs[0].token_ids), "cached": each.num_cached_tokens} for each in outputs]
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
