"""Hashes of prompts without an engine: golden values, and what tags say about how to compute them.

That the values are the engines' own is the matter of ``tests/vllm/contract`` and ``tests/sglang/contract``.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_connectors.prompt_hashes import cbor
from umbp_connectors.prompt_hashes.hasher import CannotHash, Namespace
from umbp_connectors.prompt_hashes.tags import hasher_of, tag_values
from umbp_connectors.prompt_hashes.vllm import DIGESTS

TOKENS = [1, 2, 300, 70000, 5, 6, 7, 8]
GOLDEN = {
    "sha256": [b"8450096430117202124", b"9173775816976706368"],
    "sha256_cbor": [b"8747078794441798037", b"13801342228304899088"],
    "xxhash": [b"7706681475792632118", b"15921625854511266006"],
    "xxhash_cbor": [b"681295689528679516", b"16229090496888382418"],
}
"""Four tokens per block, PYTHONHASHSEED=42."""
SALTED = {"sglang": [b"-3740230102590442519", b"-2942162852899265028"]}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_vllms_hashes(name: str) -> None:
    hasher = hasher_of({"block": "4", "hash": name, "hash_start": "seed"}, seed="42")
    assert hasher.hashes(TOKENS) == GOLDEN[name]
    assert hasher.hashes([*TOKENS, 9]) == GOLDEN[name], "a block that is not full has no hash"


def test_sglangs_hashes() -> None:
    hasher = hasher_of({"block": "4", "hash": "sglang"})
    assert hasher.hashes(TOKENS) == [b"-8879069541388082016", b"824610316039811101"]
    assert hasher.hashes(TOKENS, Namespace(cache_salt="s")) == SALTED["sglang"]


@given(st.lists(st.integers(0, 2**32), max_size=40), st.integers(1, 8), st.sampled_from([*DIGESTS, "sglang"]))
def test_a_longer_prompt_has_the_hashes_of_a_shorter_one_first(tokens: list[int], block: int, name: str) -> None:
    hasher = hasher_of({"block": str(block), "hash": name})
    whole = hasher.hashes(tokens)
    assert len(whole) == len(tokens) // block
    half = len(tokens) // 2
    assert hasher.hashes(tokens[:half]) == whole[: half // block]


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_each_part_of_a_namespace_changes_every_block(name: str) -> None:
    hasher = hasher_of({"block": "4", "hash": name})
    spaces = [
        Namespace(),
        Namespace(cache_salt="a"),
        Namespace(lora_name="a", lora_path="p"),
        Namespace(lora_name="a", lora_path="q"),
        Namespace(cache_salt="a", lora_name="a", lora_path="p"),
    ]
    seen = [each for space in spaces for each in hasher.hashes(TOKENS, space)]
    assert len(set(seen)) == len(spaces) * 2


def test_before_031_vllm_left_the_adapters_path_out() -> None:
    old = hasher_of({"block": "4", "hash": "sha256", "hash_keys": "untagged"})
    new = hasher_of({"block": "4", "hash": "sha256", "hash_keys": "tagged"})
    one, other = Namespace(lora_name="a", lora_path="p"), Namespace(lora_name="a", lora_path="q")
    assert old.hashes(TOKENS, one) == old.hashes(TOKENS, other)
    assert new.hashes(TOKENS, one) != new.hashes(TOKENS, other)
    assert old.hashes(TOKENS) == new.hashes(TOKENS)


def test_blocks_of_several_links_have_the_hash_of_the_last() -> None:
    links = hasher_of({"block": "2", "hash": "sha256"}).hashes([*TOKENS, 9, 10])
    blocks = hasher_of({"block": "2", "hash": "sha256", "hash_every": "2"})
    assert blocks.block_tokens == 4
    assert blocks.hashes([*TOKENS, 9, 10]) == [links[1], links[3]]


def test_the_same_object_twice_is_hashed_like_two_equal_ones() -> None:
    """Pickle would write a reference the second time."""
    hasher = hasher_of({"block": "4", "hash": "sha256"})
    name = "one-object"
    apart = Namespace(lora_name=name, lora_path="".join(list(name)), cache_salt="".join(list(name)))
    assert hasher.hashes(TOKENS, Namespace(name, name, name)) == hasher.hashes(TOKENS, apart)


def test_whole_digests_in_hexadecimal() -> None:
    tags = {"block": "4", "hash": "sha256", "hash_start": "seed", "hash_form": "hex"}
    (first, _) = hasher_of(tags, seed="42").hashes(TOKENS)
    assert len(first) == 64
    assert int(first, 16) & (1 << 64) - 1 == int(GOLDEN["sha256"][0])


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({}, "block="),
        ({"block": "0", "hash": "sha256"}, "block="),
        ({"block": "-4", "hash": "sha256"}, "block="),
        ({"block": "4"}, "unknown kind"),
        ({"block": "4", "hash": "md5"}, "'md5'"),
        ({"block": "4", "hash": "sha256", "hash_form": "base64"}, "'base64'"),
        ({"block": "4", "hash": "sha256", "hash_every": "0"}, "hash_every="),
        ({"block": "4", "hash": "sha256", "hash_start": "seed"}, "PYTHONHASHSEED"),
        ({"block": "4", "hash": "xxhash", "hash_start": "random"}, "drew for itself"),
    ],
)
def test_what_cannot_be_computed_says_why(tags: dict[str, str], says: str) -> None:
    with pytest.raises(CannotHash, match=says):
        hasher_of(tags)


def test_tags_are_names_with_values() -> None:
    assert tag_values(["block=16", "plain", "url=http://h/?a=b", "block=32"]) == {"block": "32", "url": "http://h/?a=b"}


def test_cbor_has_no_form_for_more_than_64_bits() -> None:
    with pytest.raises(OverflowError, match="64 bits"):
        cbor.encode(2**64)
