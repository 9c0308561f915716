"""vLLM's block hashes: ``H((hash of the block before, tokens, extra keys))``, from block to block."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from umbp_connectors.prompt_hashes import cbor
from umbp_connectors.prompt_hashes.hasher import NO_NAMESPACE, Namespace

DEFAULT_SEED = "vllm-none-hash"
"""What a cryptographic chain starts from when ``PYTHONHASHSEED`` is not set (vLLM 0.29 and later)."""
_LOW_64 = (1 << 64) - 1

Digest = Callable[[Any], bytes]


def _sha256(item: Any) -> bytes:
    return hashlib.sha256(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)).digest()


def _sha256_cbor(item: cbor.Item) -> bytes:
    return hashlib.sha256(cbor.encode(item)).digest()


def _xxhash(item: Any) -> bytes:
    return xxhash.xxh3_128_digest(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))


def _xxhash_cbor(item: cbor.Item) -> bytes:
    return xxhash.xxh3_128_digest(cbor.encode(item))


DIGESTS: dict[str, Digest] = {
    "sha256": _sha256,
    "sha256_cbor": _sha256_cbor,
    "xxhash": _xxhash,
    "xxhash_cbor": _xxhash_cbor,
}
"""By the names of ``--prefix-caching-hash-algo``."""


def as_int64(digest: bytes) -> bytes:
    """The low 64 bits in decimal: what vLLM's events say by default."""
    return b"%d" % (int.from_bytes(digest, "big") & _LOW_64)


def as_hex(digest: bytes) -> bytes:
    """The whole digest: what events say with ``VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0``."""
    return digest.hex().encode()


class VllmHasher:
    """The hashes of a vLLM whose chains start from ``seed`` and have a link every ``chain_tokens`` tokens.

    Only every ``every``-th link is the hash of a block, where all attention groups have blocks longer than a link.
    Since 0.31 what a namespace adds to a block is ``tagged`` with its kind, and an adapter is named with its path.
    """

    def __init__(
        self,
        chain_tokens: int,
        digest: Digest,
        publish: Callable[[bytes], bytes] = as_int64,
        seed: str = DEFAULT_SEED,
        *,
        every: int = 1,
        tagged: bool = True,
    ) -> None:
        self.block_tokens = chain_tokens * every
        self._chain_tokens = chain_tokens
        self._every = every
        self._digest = digest
        self._publish = publish
        self._seed = seed
        self._tagged = tagged

    def hashes(self, tokens: Sequence[int], namespace: Namespace = NO_NAMESPACE) -> list[bytes]:
        """See ``PromptHasher``; every namespace can be computed."""
        size, digest = self._chain_tokens, self._digest
        everywhere = self._adapter(namespace)
        extra = everywhere + self._salt(namespace) or None
        before = digest(self._seed)
        chain = []
        for start in range(0, len(tokens) - size + 1, size):
            before = digest((before, tuple(tokens[start : start + size]), extra))
            chain.append(before)
            extra = everywhere or None
        return list(map(self._publish, chain[self._every - 1 :: self._every]))

    def _adapter(self, namespace: Namespace) -> tuple[Any, ...]:
        if not namespace.lora_name:
            return ()
        if not self._tagged:
            return (_own(namespace.lora_name),)
        return (("lora", _own(namespace.lora_name), _own(namespace.lora_path)),)

    def _salt(self, namespace: Namespace) -> tuple[Any, ...]:
        if not namespace.cache_salt:
            return ()
        salt = _own(namespace.cache_salt)
        return (("cache_salt", salt),) if self._tagged else (salt,)


def _own(text: str) -> str:
    """A copy of ``text``: pickle refers to an object that it meets again, and the engine's are all apart."""
    return text.encode().decode()
