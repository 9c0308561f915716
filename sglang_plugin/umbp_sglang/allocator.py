"""Where SGLang's host pool (L2) lies: in anonymous memory, or in a memfd that another process can map.

SGLang has both allocators, but lets only two backends of its own choose.  The pool is allocated long before a backend
exists and outlives it, so that the choice can only come from the start options; a backend that is attached at run time
takes the pool as it is.
"""

from __future__ import annotations

import logging
from typing import Any

from umbp_core.errors import ConfigError
from umbp_sglang import compat

KEY = "allocator"
"""The key of the extra config."""
SHARED = "shm"
"""A memfd: its descriptor can be handed to another process of this host, which maps the same pages."""

_CONTEXT = "sglang.srt.runtime_context:get_memory"
_PARSER = (
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller:HybridCacheController.parse_storage_backend_extra_config"
)
_logger = logging.getLogger(__name__)


def configured() -> str | None:
    """The allocator that SGLang's start options ask for, ``None`` for its default.

    Raises ``ConfigError`` when it is none that there is.
    """
    try:
        options: Any = compat.find(_CONTEXT)()
        given, *_ = compat.find(_PARSER)(options.hicache_storage_backend_extra_config)
    except LookupError as error:
        _logger.warning("umbp: %s, so the host pool lies in ordinary memory whatever %r says", error, KEY)
        return None
    except (OSError, ValueError):
        return None  # SGLang reads the same text again when it makes the backend, and says what is wrong with it
    return chosen(given.get(KEY))


def chosen(value: object) -> str | None:
    """``value`` of the key as SGLang's name of an allocator; ``None`` where nothing was chosen."""
    if value in (None, "", "default"):
        return None
    if value == SHARED:
        return SHARED
    raise ConfigError(f"{KEY} {value!r} is not known; use {SHARED!r} for a host pool in shared memory, or leave it out")
