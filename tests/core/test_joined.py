"""Queries that are taken apart only when somebody looks, and what the index makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.index import ExternalKvIndex
from umbp_core.joined import JoinedHashes

CHAIN = [b"%d" % number for number in range(40)]
parts = st.lists(st.sampled_from([b"", b"a", b"bb", b"ccc"]), min_size=2, max_size=6)


def joined(hashes: Sequence[bytes], separator: bytes = b"\0") -> JoinedHashes:
    return JoinedHashes(separator.join(hashes), separator, len(hashes))


def loaded() -> ExternalKvIndex:
    index = ExternalKvIndex()
    index.report("n1", CHAIN, 1)
    index.report("n2", CHAIN[:24], 2)
    return index


@given(parts, st.sampled_from([b"\0", b","]))
def test_it_is_the_list_that_was_joined(hashes: list[bytes], separator: bytes) -> None:
    query = joined(hashes, separator)
    assert query.ends() == (hashes[0], hashes[-1])
    assert len(query) == len(hashes)
    assert query.consists_of(hashes)
    fresh = joined(hashes, separator)
    assert (list(fresh), fresh[1], fresh[1:], fresh.apart()) == (hashes, hashes[1], hashes[1:], hashes)


def test_one_hash_is_its_own_end() -> None:
    assert JoinedHashes(b"abc", b"\0", 1).ends() == (b"abc", b"abc")


@given(parts, parts)
def test_it_consists_of_its_hashes_only(hashes: list[bytes], others: list[bytes]) -> None:
    query = joined(hashes)
    assert query.consists_of(others) is (hashes == others)
    assert list(query) == hashes


def test_keys_with_the_separator_in_them_are_others() -> None:
    query = joined([b"a", b"b", b"c"])
    assert not query.consists_of([b"a\0b", b"c"])
    assert not query.consists_of([b"a\0b", b"c", b""])
    assert list(query) == [b"a", b"b", b"c"]


QUERIES = {
    "all": CHAIN,
    "a part": CHAIN[3:20],
    "a part that two nodes hold in part": CHAIN[10:35],
    "backwards": CHAIN[::-1],
    "its ends only": [CHAIN[0], b"x", b"y", CHAIN[3]],
    "shifted": [CHAIN[5], *CHAIN[7:12], CHAIN[11]],
    "twice": CHAIN[:5] * 2,
    "and more": [*CHAIN[-4:], b"x"],
    "nothing": [b"x", b"y", b"z", b"u"],
    "the empty hash": [b"", b"", b"", b""],
    "an end that is empty": [CHAIN[0], CHAIN[1], b""],
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("empty", [False, True])
def test_the_index_answers_as_it_answers_a_list(query: list[bytes], empty: bool) -> None:
    index, other = loaded(), loaded()
    for one in (index, other):
        if empty:
            one.report("n3", [b""], 1)
        one.revoke("n1", CHAIN[30:32], 1)  # rows without a key
        one.sweep()
    assert index.match_positions(joined(query), True, 1.0) == other.match_positions(query, True, 1.0)
    assert index.match(joined(query)) == other.match(query)
    assert index.match_prefix(joined(query)) == other.match_prefix(query)
    assert index.hits.counts(query) == other.hits.counts(query)


def test_hits_of_a_chain_are_counted_for_each_of_its_hashes() -> None:
    index = loaded()
    for length in (20, 20, 40, 10):
        index.match_positions(joined(CHAIN[:length]), True, 1.0)
    assert list(index.hits.counts(CHAIN).values()) == [4] * 10 + [3] * 10 + [1] * 20


def test_a_chain_that_was_reported_in_its_order_is_found_as_a_whole() -> None:
    index = loaded()
    for query, row in ((CHAIN, 1), (CHAIN[3:20], 4), (CHAIN[::-1], 0), ([*CHAIN[:3], b"x"], 0)):
        asked = joined(query)
        index.match_positions(asked)
        assert asked.row == row
