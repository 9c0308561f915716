"""Queries for chains that were reported as they are asked for, in part, out of order, or into rows of others."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from umbp_core.index import ExternalKvIndex

HBM, DRAM = 1, 2
CHAIN = [b"%d" % number for number in range(100)]


def held(index: ExternalKvIndex, query: Sequence[bytes]) -> dict[tuple[str, int], list[bytes]]:
    return {(match.node, tier): keys for match in index.match(query) for tier, keys in match.tiers.items()}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_match_and_prefix_agree_with_sets(data: st.DataObject) -> None:
    index, model = ExternalKvIndex(), {}
    spans = st.tuples(st.integers(0, 99), st.integers(1, 60)).map(lambda span: CHAIN[span[0] : span[0] + span[1]])
    for _ in range(data.draw(st.integers(1, 12))):
        node, tier = data.draw(st.sampled_from("abc")), data.draw(st.sampled_from((HBM, DRAM)))
        keys = data.draw(spans)
        if data.draw(st.booleans()):
            keys = data.draw(st.permutations(keys))
        known = model.setdefault((node, tier), set())
        if data.draw(st.booleans()) or not known:
            index.report(node, keys, tier)
            known.update(keys)
        else:
            index.revoke(node, keys, tier)
            known.difference_update(keys)
    query = data.draw(st.one_of(st.just(CHAIN), spans, st.lists(st.sampled_from(CHAIN), min_size=1)))
    expected = {cell: [key for key in query if key in known] for cell, known in model.items()}
    assert held(index, query) == {cell: keys for cell, keys in expected.items() if keys}
    lengths = {}
    for node in "abc":
        usable = model.get((node, HBM), set()) | model.get((node, DRAM), set())
        lengths[node] = next((at for at, key in enumerate(query) if key not in usable), len(query))
    prefixes = {match.node: match.length for match in index.match_prefix(query)}
    assert prefixes == {node: length for node, length in lengths.items() if length}


def test_tuple_is_answered_like_a_list() -> None:
    index = ExternalKvIndex()
    index.report("a", CHAIN, HBM)
    assert held(index, tuple(CHAIN)) == held(index, CHAIN) == {("a", HBM): CHAIN}


def test_chain_goes_on_past_rows_that_were_given_back() -> None:
    index = ExternalKvIndex()
    index.report("a", CHAIN, HBM)
    index.revoke("a", CHAIN[10:20], HBM)
    assert held(index, CHAIN) == {("a", HBM): CHAIN[:10] + CHAIN[20:]}
    index.report("b", CHAIN[50:60], DRAM)
    index.report("b", [b"other %d" % number for number in range(10)], DRAM)
    assert held(index, CHAIN) == {("a", HBM): CHAIN[:10] + CHAIN[20:], ("b", DRAM): CHAIN[50:60]}


def test_empty_hash_is_a_hash() -> None:
    index = ExternalKvIndex()
    index.report("a", CHAIN, HBM)
    index.revoke("a", CHAIN[1:2], HBM)
    query = [CHAIN[0], b"", *CHAIN[2:40]]
    assert held(index, query) == {("a", HBM): [CHAIN[0], *CHAIN[2:40]]}
    index.report("a", [b"last", b""], HBM)
    assert held(index, query) == {("a", HBM): query}
    assert index.match_prefix(query)[0].length == len(query)
    index.revoke("a", CHAIN[4:5], HBM)
    query = [CHAIN[2], CHAIN[3], b"", CHAIN[5]]
    assert held(index, query) == {("a", HBM): query}


def test_query_longer_than_what_follows_in_the_index() -> None:
    index = ExternalKvIndex()
    index.report("a", CHAIN[:20], HBM)
    assert held(index, CHAIN) == {("a", HBM): CHAIN[:20]}
    assert held(index, CHAIN[19:]) == {("a", HBM): CHAIN[19:20]}
    assert held(index, []) == {}
