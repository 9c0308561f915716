"""vLLM that answers line by line: reads ``{model, pool}``, says ``ready``, then answers each ``{prompts, max_tokens}``.

An answer is a list of ``{tokens, cached}``.  Before each, vLLM's own cache is emptied, so that hits are the pool's.  It
ends with its input.
"""

from __future__ import annotations

import json
import os
import sys

from vllm_engine import Engine


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    engine = Engine(task["model"], task["pool"])
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        engine.forget(asked["prompts"][0][0])
        answers.write(json.dumps(engine.answer(asked["prompts"], asked["max_tokens"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
