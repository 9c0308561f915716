"""The namespace as one process of an engine sees it.

stdin: {"model": ..., "pickled": hex or null}.  Answers with the namespace of a configuration made here, that of the
pickled one, the pickle of ours, and the optional attributes that this vLLM does not have.
"""

from __future__ import annotations

import json
import pickle
import sys

task = json.load(sys.stdin)

from vllm import EngineArgs  # noqa: E402

from umbp_vllm import compat, namespace  # noqa: E402
from umbp_vllm.hashing import hash_stability  # noqa: E402

missing = set()
real = compat.optional


def recording(owner, name, default=None):
    if owner is not None and not hasattr(owner, name):
        missing.add(f"{type(owner).__name__}.{name}")
    return real(owner, name, default)


compat.optional = recording
config = EngineArgs(model=task["model"], skip_tokenizer_init=True, kv_connector="umbp").create_engine_config()
name, description = namespace.namespace_of(config, None, "team-a")
given = task["pickled"] and pickle.loads(bytes.fromhex(task["pickled"]))
answers = {
    "name": name,
    "description": description,
    "of_pickled": namespace.namespace_of(given, None, "team-a")[0] if given else None,
    "pickled": pickle.dumps(config).hex(),
    "missing": sorted(missing),
    "stable": hash_stability(config, {}).stable,
    "engine_id": config.kv_transfer_config.engine_id,
    "rank": namespace.rank_scope(config, 0, 0, False).describe(),
}
sys.stdout.write("\n" + json.dumps(answers) + "\n")
