"""SGLang's own functions of hashes, for pages whose requests have a namespace."""

from __future__ import annotations

from typing import Any

from umbp_connectors.prompt_hashes.sglang import salted_seed
from umbp_sglang import compat

_UTILS = "sglang.srt.mem_cache.utils"
_EVENTS = "sglang.srt.disaggregation.kv_events"


class SglangChains:
    """See ``Chains``.  ``names`` is SGLang's table of adapters, or ``None``; ``dynamo`` is the format of its events.

    ``publishes`` says whether this rank has the event stream; the tables of the others lack names that only requests
    bring along.  Raises ``LookupError`` where SGLang has no such functions.
    """

    def __init__(self, names: Any = None, dynamo: bool = False, publishes: bool = True) -> None:
        self._stored = compat.find(f"{_UTILS}:get_storage_hash_str")
        self._hashes = compat.find(f"{_UTILS}:get_hash_str")
        self._number = compat.find(f"{_UTILS}:hash_str_to_int64")
        self._seed = compat.find(f"{_EVENTS}:kv_event_namespace_seed")
        self._namespaced = compat.find(f"{_EVENTS}:namespaced_block_hash")
        self.use(names, dynamo, publishes)

    def use(self, names: Any, dynamo: bool, publishes: bool) -> None:
        """What is known of the stream from now on; before the first page is named."""
        self._names = names
        self._dynamo = dynamo
        self._publishes = publishes

    def stored(self, key: Any, parent: str | None, pages: int) -> list[str]:
        """See ``Chains``."""
        hashes: list[str] = self._stored(key, parent, len(key) // pages)
        return hashes

    def events(self, key: Any, parent: str | None, pages: int) -> list[str]:
        """See ``Chains``."""
        if parent is None and key.cache_salt is not None:
            parent = salted_seed(key.cache_salt).hex()
        hashes: list[str] = self._hashes(key, parent, len(key) // pages)
        return hashes

    def published(self, key: Any, event: str) -> int:
        """See ``Chains``."""
        if self._dynamo:
            seed = self._seed(extra_key=key.extra_key, cache_salt=key.cache_salt)
        else:
            seed = self._seed(extra_key=key.extra_key, cache_salt=None) if self._has_name(key.extra_key) else None
        published: int = self._namespaced(self._number(event), namespace_seed=seed)
        return published

    def _has_name(self, extra_key: str | None) -> bool:
        """Whether the stream knows the adapter that ``extra_key`` ends with by a name."""
        if self._names is None:
            return False
        find = self._names.get if self._publishes else self._names.resolve
        return find(extra_key) is not None
