"""Our computation of SGLang's published hashes against the installed SGLang's trees and the events that they tell."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.disaggregation.kv_events import BlockStored
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.events import KvEventLoraNames
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_hash_str, hash_str_to_int64
from sglang.test.kits.unified_radix_cache import fixtures

from tests.sglang.kit.shapes import FULL
from umbp_connectors.prompt_hashes.hasher import Namespace
from umbp_connectors.prompt_hashes.sglang import SGLangHasher
from umbp_connectors.prompt_hashes.tags import hasher_of

TOKENS = [0, 1, 2**31, 2**32 - 1, *range(100, 100 + 28)]


def event_hashes(extra_key: str | None, cache_salt: str | None, names: object = None) -> list[bytes]:
    """What a real tree, of the kind that this installation uses, tells of a prompt that is inserted in two halves."""
    cache, allocator, _ = fixtures.build_fixture(FULL, enable_kv_cache_events=True, kv_event_lora_names=names)
    cache.take_events()  # a new tree says that it is empty
    told: list[bytes] = []
    for tokens in (TOKENS[: len(TOKENS) // 2], TOKENS):
        key = RadixKey(array("q", tokens), extra_key=extra_key, cache_salt=cache_salt)
        slots = allocator.alloc(len(tokens))
        cache.insert(InsertParams(key=key, value=slots.to(torch.int64)))
        for event in cache.take_events():
            assert isinstance(event, BlockStored)
            told += [str(each).encode() for each in event.block_hashes]
    return told


@pytest.mark.parametrize("extra_key", [None, "someone"])
@pytest.mark.parametrize("salt", ["", "tenant-7"])
def test_our_hashes_are_those_of_the_trees_events(extra_key: str | None, salt: str) -> None:
    hasher = hasher_of({"block": str(FULL.page_size), "hash": "sglang"})
    ours = hasher.hashes(TOKENS, Namespace(cache_salt=salt))
    assert len(ours) == len(TOKENS) // FULL.page_size > 1
    assert event_hashes(extra_key, salt or None) == ours


@pytest.mark.parametrize("bigrams", [False, True])
@pytest.mark.parametrize("page", [1, 4, 16])
def test_pages_of_wide_tokens_and_of_pairs_are_hashed_like_the_engines(page: int, bigrams: bool) -> None:
    tokens = [*range(40), 2**32, *range(50), 2**62, 5]
    key = RadixKey(array("q", tokens), is_bigram=bigrams).page_aligned(page)
    theirs = [b"%d" % hash_str_to_int64(each) for each in get_hash_str(key, None, page_size=page)]
    assert SGLangHasher(page, bigrams=bigrams).hashes(tokens) == theirs


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5])
def test_only_full_pages_count(length: int) -> None:
    assert len(SGLangHasher(4).hashes(list(range(length)))) == length // 4
    assert len(SGLangHasher(4, bigrams=True).hashes(list(range(length)))) == max(0, length - 1) // 4


@pytest.mark.parametrize("salt", ["", "tenant-7"])
def test_an_adapter_of_the_start_has_the_names_of_its_events(salt: str) -> None:
    """One that is loaded later has an id of its own, under which nobody finds anything."""
    extra_key = LoRARef.deterministic_id("poet", "/adapters/poet")
    names = KvEventLoraNames()
    names.register(SimpleNamespace(lora_id=extra_key, extra_key=extra_key), "poet")
    told = event_hashes(extra_key, salt or None, names)
    hasher = hasher_of({"block": str(FULL.page_size), "hash": "sglang"})
    assert hasher.hashes(TOKENS, Namespace(salt, "poet", "/adapters/poet")) == told
    assert not set(told) & set(hasher.hashes(TOKENS, Namespace(salt)))
