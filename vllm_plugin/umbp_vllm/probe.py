"""``python -m umbp_vllm.probe``: which of our entry points and flags are live in the installed vLLM.

Prints one line of JSON: question -> {live, found, advice}.  Run by ``umbp doctor`` in a process of its own,
because importing vLLM takes seconds and gigabytes.  Raises nothing but what importing vLLM raises.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from typing import Any

from umbp_vllm.registration import NO_CLI_HOOK, hooks_wanted

_JSON_FORM = """--kv-transfer-config '{"kv_connector":"umbp","kv_role":"kv_both"}'"""


def answer(live: bool, found: str, advice: str = "") -> dict[str, object]:
    """One entry of the output."""
    return {"live": live, "found": found, "advice": advice}


def main() -> None:
    """Ask, and print."""
    arg_utils = importlib.import_module("vllm.engine.arg_utils")
    early = _takes_keyword(arg_utils.EngineArgs)  # asked before anything loads the general plugins
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    options = arg_utils.AsyncEngineArgs.add_cli_args(parser)._option_string_actions
    factory = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.factory").KVConnectorFactory
    known = "umbp" in factory._registry
    flags = {
        "--kv-connector": "--kv-connector" in options,
        "--kv-offloading-backend umbp": "umbp" in _choices(options, "--kv-offloading-backend"),
        "LLM(kv_connector=...)": early,
    }
    print(json.dumps({"connector umbp": _connector(known)} | {name: _flag(flags[name], known) for name in flags}))


def _connector(known: bool) -> dict[str, object]:
    if known:
        return answer(True, "known to KVConnectorFactory")
    return answer(False, "vLLM does not know it", "is umbp left out by VLLM_PLUGINS? VLLM_LOGGING_LEVEL=DEBUG says why")


def _flag(live: bool, known: bool) -> dict[str, object]:
    if live:
        return answer(True, "live")
    if not known:
        return answer(False, "not there", "follows from the connector: see above")
    if not hooks_wanted(os.environ):
        return answer(False, f"switched off by {NO_CLI_HOOK}", f"unset it, or use {_JSON_FORM}")
    return answer(False, "this vLLM does not take it", f"use {_JSON_FORM}")


def _choices(options: Any, name: str) -> tuple[str, ...]:
    action = options.get(name)
    return tuple(action.choices or ()) if action is not None else ()


def _takes_keyword(engine_args: Any) -> bool:
    return "kv_connector" in inspect.signature(engine_args.__init__, follow_wrapped=False).parameters


if __name__ == "__main__":
    main()
