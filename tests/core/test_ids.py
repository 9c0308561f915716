from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.ids import IDENTITY_BYTES, Identity, RankScope, block_key, digest_of

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
descriptions = st.dictionaries(st.text(max_size=5), json_values, max_size=4)

IDENTITY = Identity(namespace="model", layout=b"\x01" * 32, rank=RankScope(tp_rank=1, tp_size=2))


def test_a_block_key_ends_with_the_group() -> None:
    assert block_key(b"hash", 258) == b"hash\x00\x00\x01\x02"


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_groups_of_one_block_have_different_keys(block_hash: bytes, one: int, other: int) -> None:
    assert (block_key(block_hash, one) == block_key(block_hash, other)) is (one == other)


def test_a_group_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError):
        block_key(b"hash", 2**32)


@given(descriptions)
def test_a_digest_does_not_depend_on_the_order_of_its_keys(description: dict[str, object]) -> None:
    backwards = dict(reversed(list(description.items())))
    assert digest_of(description) == digest_of(backwards)
    assert len(digest_of(description)) == IDENTITY_BYTES


def test_a_digest_is_the_sha256_of_canonical_json() -> None:
    assert digest_of({"b": [1, None], "a": "ü"}) == hashlib.sha256(b'{"a":"\\u00fc","b":[1,null]}').digest()


def test_a_description_with_values_that_are_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        digest_of({"dtype": object()})


@pytest.mark.parametrize(
    "other",
    [
        replace(IDENTITY, namespace="other model"),
        replace(IDENTITY, layout=b"\x02" * 32),
        replace(IDENTITY, rank=RankScope()),
        replace(IDENTITY, rank=RankScope(tp_rank=0, tp_size=2)),
        replace(IDENTITY, rank=RankScope(tp_rank=1, tp_size=4)),
        replace(IDENTITY, rank=RankScope(tp_rank=1, tp_size=2, pp_rank=1)),
        replace(IDENTITY, rank=RankScope(tp_rank=1, tp_size=2, pp_size=2)),
        replace(IDENTITY, rank=RankScope(tp_rank=1, tp_size=2, cp_rank=1)),
        replace(IDENTITY, rank=RankScope(tp_rank=1, tp_size=2, cp_size=2)),
        replace(IDENTITY, rank=RankScope(tp_rank=1, tp_size=2, replicated=True)),
    ],
)
def test_whatever_differs_makes_another_object(other: Identity) -> None:
    assert other.digest != IDENTITY.digest
    assert other.object_key(b"block") != IDENTITY.object_key(b"block")


def test_replicated_ranks_share_their_objects() -> None:
    one, other = (
        replace(IDENTITY, rank=RankScope(tp_rank=rank, tp_size=size, replicated=True))
        for rank, size in [(0, 2), (3, 4)]
    )
    assert one.object_key(b"block") == other.object_key(b"block")


def test_an_object_key_is_the_identity_and_the_block_key() -> None:
    assert IDENTITY.object_key(b"block") == IDENTITY.digest + b"block"
    assert len(IDENTITY.digest) == IDENTITY_BYTES
