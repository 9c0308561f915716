"""``python -m umbp_sglang.probe``: whether our backend and its hooks are live in the installed SGLang.

Prints one line of JSON: question -> {live, found, advice}.  Run by ``umbp doctor`` in a process of its own, because
importing SGLang takes seconds and gigabytes.  Raises nothing but what importing SGLang raises.
"""

from __future__ import annotations

import json
import os
import subprocess

from umbp_sglang import compat, page_hash, registration
from umbp_sglang.hooks import BACKEND, OPTION


def answer(live: bool, found: str, advice: str = "") -> dict[str, object]:
    """One entry of the output."""
    return {"live": live, "found": found, "advice": advice}


def main() -> None:
    """Ask, and print."""
    compat.find("sglang.srt.plugins:load_plugins")()
    answers = {f"backend {BACKEND}": backend()}
    if answers[f"backend {BACKEND}"]["live"]:
        answers |= {
            f"hook {hook.name}": of_hook(hook) for hook in (*registration.MORE_HOOKS, *registration.REPORTING_HOOKS)
        }
        answers[f"{OPTION} {BACKEND}"] = command_line()
    answers["SGLang's page hash"] = hashing()
    print(json.dumps(answers))


def backend() -> dict[str, object]:
    """Whether SGLang would make our store for our name."""
    if registration.is_set(os.environ, registration.NO_HOOKS):
        return answer(False, f"switched off by {registration.NO_HOOKS}", f"unset it, or use {registration.DYNAMIC}")
    try:
        registration.FACTORY_HOOK.probe()
    except LookupError as error:
        return answer(False, str(error), f"use {registration.DYNAMIC}")
    owner = registration.other_owner(compat.find(registration.FACTORY))
    if owner:
        return answer(False, f"SGLang has its own: {owner}", f"set {registration.OVERRIDE}=1 for ours")
    if not registration.is_applied(registration.FACTORY_HOOK):
        return answer(False, "SGLang does not know it", "is umbp left out by SGLANG_PLUGINS?")
    return answer(True, f"{registration.STORE_MODULE}.{registration.STORE_CLASS}")


def of_hook(hook: registration.Hook) -> dict[str, object]:
    """Whether ``hook`` is in its place."""
    try:
        hook.probe()
    except LookupError as error:
        return answer(False, str(error), hook.without)
    if registration.is_applied(hook):
        return answer(True, hook.target.partition(":")[2])
    return answer(False, "not in place", hook.without)


def command_line() -> dict[str, object]:
    """Whether SGLang's command line takes our name."""
    parser = compat.find("argparse:ArgumentParser")()
    compat.find("sglang.srt.server_args:ServerArgs").add_cli_args(parser)
    action = parser._option_string_actions.get(OPTION)
    if action is not None and BACKEND in (action.choices or ()):
        return answer(True, "live")
    return answer(False, "this SGLang does not take it", f"use {registration.DYNAMIC}")


def hashing() -> dict[str, object]:
    """Whether SGLang can name pages at all, for any storage."""
    try:
        missing = page_hash.missing()
    except (OSError, subprocess.TimeoutExpired) as error:
        missing = f"the compiler does not run ({error})"
    return answer(False, missing, page_hash.ADVICE) if missing else answer(True, "can be compiled")


if __name__ == "__main__":
    main()
