"""SGLang's page hashes, computed a second time from their description: our keys and the master's stand on them."""

from __future__ import annotations

import hashlib
from array import array

import pytest
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str, hash_str_to_int64, storage_namespace_seed

PAGE = 4


def chain(tokens: list[int], prior: str | None, page: int = PAGE) -> list[str]:
    """SHA-256 over the previous page's digest and the page's tokens, each four bytes, little-endian."""
    before = b"" if prior is None else bytes.fromhex(prior)
    hashes = []
    for start in range(0, len(tokens), page):
        state = hashlib.sha256(before)
        for token in tokens[start : start + page]:
            state.update(token.to_bytes(4, "little"))
        before = state.digest()
        hashes.append(before.hex())
    return hashes


def seed(extra_key: str | None, cache_salt: str | None) -> str | None:
    """The namespace's digest, from which its chains start; a request's empty salt counts as none."""
    if extra_key is None and cache_salt is None:
        return None
    state = hashlib.sha256(b"sglang-cache-namespace-v1")
    for part in (extra_key, cache_salt):
        text = None if part is None else part.encode()
        state.update(b"\0" if text is None else b"\1" + len(text).to_bytes(8, "little") + text)
    return state.hexdigest()


@pytest.mark.parametrize("extra_key", [None, "", "lora"])
@pytest.mark.parametrize("cache_salt", [None, "", "tenant"])
def test_the_chain_is_what_we_say_it_is(extra_key: str | None, cache_salt: str | None) -> None:
    tokens = [0, 1, 2**31, 2**32 - 1, *range(100, 108)]
    key = RadixKey(array("q", tokens), extra_key=extra_key, cache_salt=cache_salt)
    assert storage_namespace_seed(extra_key, cache_salt) == seed(extra_key, cache_salt)
    assert get_storage_hash_str(key, page_size=PAGE) == chain(tokens, seed(extra_key, cache_salt or None))


def test_a_chain_goes_on_from_the_last_page() -> None:
    tokens = list(range(16))
    first = chain(tokens[:8], None)
    rest = get_storage_hash_str(RadixKey(array("q", tokens[8:])), first[-1], page_size=PAGE)
    assert [*first, *rest] == chain(tokens, None)


def test_the_hash_covers_tokens_and_namespace_only() -> None:
    """Model, layout and type are our identity's matter; the size of a page shows in the hash only as what it covers."""
    tokens = list(range(8))
    one_page = get_storage_hash_str(RadixKey(array("q", tokens)), page_size=8)
    assert one_page == chain(tokens, None, page=8)
    assert one_page != chain(tokens, None)[-1:]


def test_the_event_hash_is_the_beginning_of_the_key() -> None:
    for text in chain(list(range(64)), None):
        unsigned = int(text[:16], 16)
        assert hash_str_to_int64(text) == (unsigned - 2**64 if unsigned >= 2**63 else unsigned)


def test_our_key_is_the_hash_itself() -> None:
    from umbp_sglang.keys import block_keys

    hashes = chain(list(range(16)), None)
    assert block_keys(hashes) == [bytes.fromhex(text) for text in hashes]
