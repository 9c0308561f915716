"""SGLang's page hashes as its events say them: a SHA-256 chain, of which the first 64 bits are published."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

from umbp_connectors.prompt_hashes.hasher import NO_NAMESPACE, CannotHash, Namespace

_SALT_TAG = b"sglang-cache-salt-v1\0"
"""SGLang has this one in the middle of a function."""
_WIDE_TAG = b"\xff"
"""Before a page with a token of more than 32 bits, all of whose tokens are written with 64."""
_NARROW = 1 << 32


def salted_seed(cache_salt: str) -> bytes:
    """What the first page's hash goes on from in a request with this salt."""
    return hashlib.sha256(_SALT_TAG + cache_salt.encode()).digest()


class SGLangHasher:
    """The hashes of an SGLang with pages of ``block_tokens`` tokens.

    With ``bigrams`` (EAGLE's trees) a page covers pairs of neighbours, and a prompt has one pair less than tokens.
    A request's ``extra_key`` is not part of what is published.
    """

    def __init__(self, block_tokens: int, *, bigrams: bool = False) -> None:
        self.block_tokens = block_tokens
        self._bigrams = bigrams

    def hashes(self, tokens: Sequence[int], namespace: Namespace = NO_NAMESPACE) -> list[bytes]:
        """See ``PromptHasher``.  Raises ``CannotHash`` for an adapter: SGLang draws a new name at each of its loads."""
        if namespace.lora_name:
            raise CannotHash(
                f"SGLang publishes the blocks of adapter {namespace.lora_name!r} under a name that it draws when it "
                "loads it; they cannot be found by their tokens"
            )
        before = salted_seed(namespace.cache_salt) if namespace.cache_salt else b""
        size, ahead = self.block_tokens, int(self._bigrams)
        published = []
        for start in range(0, len(tokens) - ahead - size + 1, size):
            page = tokens[start : start + size + ahead]
            before = hashlib.sha256(before + self._bytes_of(page)).digest()
            published.append(b"%d" % int.from_bytes(before[:8], "big", signed=True))
        return published

    def _bytes_of(self, page: Sequence[int]) -> bytes:
        wide = max(page) >= _NARROW
        units = [token for pair in pairwise(page) for token in pair] if self._bigrams else page
        if wide:
            return _WIDE_TAG + b"".join(token.to_bytes(8, "little") for token in units)
        return b"".join(token.to_bytes(4, "little") for token in units)
