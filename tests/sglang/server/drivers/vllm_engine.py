"""The vLLM of the drivers beside this file, which run as programs in vLLM's environment."""

from __future__ import annotations

import os
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


class Engine:
    """A small vLLM over a pool.  Answers are lists of ``{tokens, cached}``, in the order of the prompts."""

    def __init__(self, model: str, pool: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=model,
            kv_connector="umbp",
            kv_transfer_config={"kv_connector_extra_config": pool},
            dtype="float32",
            max_model_len=2048,
            block_size=64,
            enforce_eager=True,
        )

    def answer(self, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
        """So many tokens to each prompt, and how many of its own came from a cache."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(asked, sampling, use_tqdm=False)
        return [{"tokens": list(each.outputs[0].token_ids), "cached": each.num_cached_tokens} for each in outputs]

    def forget(self, token: int) -> None:
        """Empty vLLM's own cache, as soon as nothing is being stored; prompts of ``token`` make it step until then."""
        deadline = time.monotonic() + 120
        while not self._llm.reset_prefix_cache() and time.monotonic() < deadline:
            self.answer([[token]], 1)
