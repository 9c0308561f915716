"""The hooks themselves: what they do inside SGLang, once they are in place.

Each runs inside one call of SGLang's and changes nothing for any other backend.  ``registration`` says where they go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from umbp_sglang import allocator, compat

BACKEND = "umbp"
"""The backend's name in SGLang."""
KV = "kv"
"""SGLang's name of the main pool."""
OPTION = "--hicache-storage-backend"
"""The option whose choices are extended."""

_logger = logging.getLogger(__name__)


def offer_choice(result: object, parser: Any) -> None:
    """After ``ServerArgs.add_cli_args``: one more choice for the option.

    SGLang rebuilds its list for every parser, so that the parser's own is the only one that can be extended.
    """
    action = parser._option_string_actions.get(OPTION)
    if action is None:
        _logger.warning("umbp: this SGLang has no option %s; start the backend with Engine(...) or over HTTP", OPTION)
    elif action.choices is not None and BACKEND not in action.choices:
        action.choices = [*action.choices, BACKEND]


def create_backend(
    original: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_class: Any,
    storage_config: Any,
    mem_pool_host: Any,
) -> Any:
    """Around ``StorageBackendFactory._create_builtin_backend``, which makes the names that it knows only."""
    if backend_name == BACKEND:
        return backend_class(storage_config, mem_pool_host)
    return original(factory, backend_name, backend_class, storage_config, mem_pool_host)


def use_zero_copy(controller: Any, *_args: object, **_kwargs: object) -> None:
    """Before ``HiCacheController._start_storage_threads``: pages go by their addresses, not as copies.

    SGLang has a fixed list of backends that may; all others get two more copies of every page.
    """
    if controller.storage_backend_type == BACKEND:
        controller.page_get_func = controller._page_get_zero_copy
        controller.page_set_func = controller._page_set_zero_copy


def backs_up(original: Callable[..., bool], controller: Any, transfer: Any) -> bool:
    """Around ``HybridCacheController.should_backup``: every rank stores its own heads of a draft model.

    Where KV is the same on all ranks, SGLang lets one of them write, and knows one backend that does better.
    """
    if original(controller, transfer):
        return True
    if controller.storage_backend_type != BACKEND or str(transfer.name) == KV:
        return False
    entry = controller.mem_pool_host.entry_map.get(transfer.name)
    return entry is not None and compat.has_heads(entry.host_pool)


def choose_allocator(original: Callable[..., Any], allocator_type: str) -> Any:
    """Around ``get_allocator_from_storage``: the host pool's memory is what the extra config says.

    Raises ``ConfigError`` for an allocator that does not exist.
    """
    if allocator_type == BACKEND:
        allocator_type = allocator.configured() or allocator_type
    return original(allocator_type)
