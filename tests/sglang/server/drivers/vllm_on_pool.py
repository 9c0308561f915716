"""vLLM on a pool folder: reads ``{model, pool, prompts, max_tokens}``, answers with two lists of ``{tokens, cached}``.

Between ``cold`` and ``again``, vLLM's own cache is emptied, so that ``again`` comes from the pool.
"""

from __future__ import annotations

import json
import sys

from vllm_engine import Engine


def main() -> None:
    task = json.load(sys.stdin)
    engine = Engine(task["model"], task["pool"])
    results = {}
    for name in ("cold", "again"):
        results[name] = engine.answer(task["prompts"], task["max_tokens"])
        engine.forget(task["prompts"][0][0])
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
