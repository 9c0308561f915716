"""SGLang's page hashes as its events say them: a SHA-256 chain, of which the first 64 bits are published."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from itertools import pairwise

from umbp_connectors.prompt_hashes.hasher import NO_NAMESPACE, Namespace

_SALT_TAG = b"sglang-cache-salt-v1\0"
"""SGLang has this one in the middle of a function."""
_NAMESPACE_TAG = b"sglang-kv-event-namespace-v1"
_WIDE_TAG = b"\xff"
"""Before a page with a token of more than 32 bits, all of whose tokens are written with 64."""
_NARROW = 1 << 32


def salted_seed(cache_salt: str) -> bytes:
    """What the first page's hash goes on from in a request with this salt."""
    return hashlib.sha256(_SALT_TAG + cache_salt.encode()).digest()


def adapter_id(name: str, path: str) -> str:
    """What SGLang calls an adapter of ``--lora-paths``; one that is loaded later gets an id that nobody can know."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{name}\0{path}").hex


class SGLangHasher:
    """The hashes of an SGLang with pages of ``block_tokens`` tokens.

    With ``bigrams`` (EAGLE's trees) a page covers pairs of neighbours, and a prompt has one pair less than tokens.
    A request's ``extra_key`` is not part of what is published, unless it has an adapter too.
    """

    def __init__(self, block_tokens: int, *, bigrams: bool = False) -> None:
        self.block_tokens = block_tokens
        self._bigrams = bigrams

    def hashes(self, tokens: Sequence[int], namespace: Namespace = NO_NAMESPACE) -> list[bytes]:
        """See ``PromptHasher``.  An adapter is taken to be one of ``--lora-paths``."""
        before = salted_seed(namespace.cache_salt) if namespace.cache_salt else b""
        size, ahead = self.block_tokens, int(self._bigrams)
        published = []
        for start in range(0, len(tokens) - ahead - size + 1, size):
            page = tokens[start : start + size + ahead]
            before = hashlib.sha256(before + self._bytes_of(page)).digest()
            published.append(before[:8])
        if namespace.lora_name:
            seed = _namespace_seed(adapter_id(namespace.lora_name, namespace.lora_path))
            published = [hashlib.sha256(seed + each).digest()[:8] for each in published]
        return [b"%d" % int.from_bytes(each, "big", signed=True) for each in published]

    def _bytes_of(self, page: Sequence[int]) -> bytes:
        wide = max(page) >= _NARROW
        units = [token for pair in pairwise(page) for token in pair] if self._bigrams else page
        if wide:
            return _WIDE_TAG + b"".join(token.to_bytes(8, "little") for token in units)
        return b"".join(token.to_bytes(4, "little") for token in units)


def _namespace_seed(extra_key: str) -> bytes:
    """What SGLang puts before the published hashes of requests with an adapter; its salt is in their chain already."""
    key = extra_key.encode()
    return hashlib.sha256(_NAMESPACE_TAG + b"\x01" + len(key).to_bytes(8, "little") + key + b"\x00").digest()
