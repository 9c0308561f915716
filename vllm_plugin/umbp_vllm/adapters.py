"""Which LoRA adapter a request's KV is of, beyond the name and the path that vLLM's block hashes have.

Other weights may come to lie under an old path, and then the KV of the old ones must not be found.  So what the
adapter's files are is part of the keys of its blocks.  Threads read them; until they have, the request has no keys.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import deque
from typing import Any, TypeAlias

from umbp_connectors.adapter_origin import adapter_origin
from umbp_core.ids import digest_of
from umbp_vllm import compat

logger = logging.getLogger("vllm.umbp.adapters")

_NOTHING = hashlib.sha256().hexdigest()

_Place: TypeAlias = "tuple[str, str]"
"""What vLLM's hashes have of an adapter."""


class AdapterKey:
    """What the keys of one adapter's blocks begin with.  Scheduler thread only.

    ``prefix`` is ``None`` as long as that is not known; ``refused`` says that it will not be used.
    """

    __slots__ = ("prefix", "refused")

    def __init__(self) -> None:
        self.prefix: bytes | None = None
        self.refused = False


class Adapters:
    """The adapters that this engine has met.  Scheduler thread only; reads files in threads of its own.

    An adapter is looked at when its first request comes, once for each time that it was loaded under a number of its
    own.  vLLM keeps blocks in HBM by name and path alone.  So where both were seen with other weights, or the
    adapter is loaded in place, which vLLM may do in any step, nothing of it is loaded or stored from then on.
    """

    def __init__(self) -> None:
        self._found: deque[tuple[_Place, AdapterKey, bytes]] = deque()
        self._keys: dict[tuple[_Place, int], AdapterKey] = {}
        self._first: dict[_Place, bytes] = {}
        self._refused: set[_Place] = set()
        self._own = os.urandom(32).hex()

    def of(self, lora: Any | None) -> AdapterKey | None:
        """The key of the adapter of vLLM's ``LoRARequest``; ``None`` without one.  Never waits."""
        if lora is None:
            return None
        path = lora.lora_path if compat.has_tagged_hash_keys(compat.vllm_version()) else ""
        place = (lora.lora_name, path)
        if lora.load_inplace:
            self._refuse(place, "it is loaded in place, which may change its weights in any step")
        known = self._keys.get((place, lora.lora_int_id))
        if known is None:
            known = self._keys[place, lora.lora_int_id] = AdapterKey()
            known.refused = place in self._refused
            if not known.refused:
                threading.Thread(target=self._look, args=(lora, place, known), name="umbp-adapter", daemon=True).start()
        return known

    def take(self) -> None:
        """Take what the threads found.  Never waits."""
        while self._found:
            place, key, prefix = self._found.popleft()
            if self._first.setdefault(place, prefix) != prefix:
                self._refuse(place, "its weights are others than before under the same name and path")
            key.refused = place in self._refused
            key.prefix = prefix

    def _look(self, lora: Any, place: _Place, key: AdapterKey) -> None:
        """Thread: find out what the adapter is."""
        try:
            origin = _origin(lora.lora_path)
        except Exception:  # op boundary: what one adapter's files do to their reader must not keep its requests waiting
            logger.exception("umbp: what adapter %s is cannot be found out", place[0])
            origin = None
        if origin is None:
            origin = {"own": self._own, "number": lora.lora_int_id, "path": lora.lora_path}
            logger.info("umbp: the files of adapter %s are not to be read; its KV is kept for this engine", place[0])
        fused = bool(compat.optional(lora, "is_3d_lora_weight", False))
        self._found.append((place, key, digest_of({**origin, "fused": fused})))

    def _refuse(self, place: _Place, reason: str) -> None:
        if place in self._refused:
            return
        self._refused.add(place)
        for (other, _), key in self._keys.items():
            if other == place:
                key.refused = True
        logger.warning("umbp: nothing of adapter %s is loaded or stored any more: %s", place[0], reason)


def _origin(path: str) -> dict[str, object] | None:
    """Digests of the adapter's files, or the commit of its repository; ``None`` where neither is to be had."""
    try:
        weights, configs = adapter_origin(path)
    except OSError:
        return None
    files = weights["files"]
    if not configs or (not weights["commit"] and (not isinstance(files, dict) or files["weights"] == _NOTHING)):
        return None
    return {"commit": weights["commit"], "files": files, "configs": configs}
