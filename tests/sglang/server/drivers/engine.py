"""``sglang.Engine`` on a pool folder: reads ``{arguments, prompts, max_tokens}``, answers ``[{tokens, storage}]``."""

from __future__ import annotations

import json
import sys


def main() -> None:
    import sglang

    task = json.load(sys.stdin)
    engine = sglang.Engine(**task["arguments"])
    try:
        sampling = {"temperature": 0, "max_new_tokens": task["max_tokens"], "ignore_eos": True}
        answers = [engine.generate(input_ids=prompt, sampling_params=sampling) for prompt in task["prompts"]]
    finally:
        engine.shutdown()
    found = [
        {
            "tokens": answer["output_ids"],
            "storage": (answer["meta_info"].get("cached_tokens_details") or {}).get("storage", 0),
        }
        for answer in answers
    ]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
