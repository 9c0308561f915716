"""Every difference between the supported SGLang versions, and the only place that asks for what may not be there."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

_KEPT = "_umbp_reporting"
_HEAD_POOLS = ("MHATokenToKVPoolHost", "MHATokenToKOnlyPoolHost")


def optional(owner: Any, name: str, default: Any = None) -> Any:
    """``owner.name``, or ``default`` where this SGLang has no such attribute (or no such owner)."""
    return getattr(owner, name, default)


def find(target: str) -> Any:
    """What stands at ``target``, written ``module:name`` or ``module:Class.name``.

    Imports the module.  Raises ``LookupError`` that says what is missing.
    """
    module_name, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise LookupError(f"{module_name} cannot be imported ({error})") from error
    for name in path.split("."):
        owner, found = found, optional(found, name)
        if found is None:
            raise LookupError(f"{optional(owner, '__name__', module_name)} has no {name}")
    return found


def require_parameters(target: str, parameters: Sequence[str]) -> None:
    """Check that the callable at ``target`` still takes ``parameters``, in this order.  Raises ``LookupError``."""
    has = list(inspect.signature(find(target)).parameters)
    if [name for name in has if name in parameters] != list(parameters):
        raise LookupError(f"{target.rpartition(':')[2]} takes ({', '.join(has)}), not ({', '.join(parameters)})")


def has_heads(host_pool: Any) -> bool:
    """Whether ``host_pool`` keeps keys or values by heads, of which each TP rank has its own.

    Where SGLang does not tell, it counts as such a pool: bytes taken for another rank's would be wrong.
    """
    try:
        kinds = [find(f"sglang.srt.mem_cache.pool_host.mha:{name}") for name in _HEAD_POOLS]
    except LookupError:
        return True
    return isinstance(host_pool, tuple(kinds))


def keep(owner: Any, ours: Any) -> None:
    """Leave ``ours`` with ``owner``, an object of SGLang's that outlives a storage."""
    setattr(owner, _KEPT, ours)


def kept(owner: Any) -> Any:
    """What was left there, ``None`` where nothing was."""
    return getattr(owner, _KEPT, None)
