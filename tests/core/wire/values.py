"""Strategies for everything that the messages carry."""

from __future__ import annotations

from hypothesis import strategies as st

from umbp_core.index_feed import Change, ChangeKind, FeedPage
from umbp_core.index_gate import Acknowledgement, Action, ActionKind, Batch, Verdict
from umbp_core.index_match import PositionMatch, PrefixMatch, TierRun
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import (
    BlockPage,
    GetRoute,
    HashChange,
    HashExplanation,
    Heartbeat,
    HeartbeatReply,
    NodeInfo,
    NodeStatus,
    PutOutcome,
    PutRoute,
    Registration,
    TierCapacity,
)
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample
from umbp_core.wire.columns import pack_bitmap

NAMES = st.text(max_size=12)
KEYS = st.binary(max_size=24)
HASHES = st.lists(KEYS, max_size=12)
TIERS = st.integers(-(2**31), 2**31 - 1)
SIZES = st.integers(0, 2**64 - 1)
COUNTS = st.integers(0, 2**63 - 1)
NUMBERS = st.floats(allow_nan=False)
CAPACITIES = st.lists(st.builds(TierCapacity, TIERS, COUNTS, COUNTS), max_size=4).map(tuple)
TAGS = st.lists(NAMES, max_size=4).map(tuple)
TIER_COUNTS = st.dictionaries(TIERS, COUNTS, max_size=4)

REGISTRATIONS = st.builds(Registration, NAMES, NAMES, NAMES, st.binary(max_size=40), CAPACITIES, TAGS, COUNTS)
DELTAS = st.builds(Delta, KEYS, TIERS, st.none() | SIZES)
BUNDLES = st.builds(Bundle, COUNTS, st.lists(DELTAS, max_size=6).map(tuple))
HEARTBEATS = st.builds(
    Heartbeat,
    NAMES,
    st.lists(BUNDLES, max_size=4),
    st.booleans(),
    COUNTS,
    st.none() | CAPACITIES,
    st.none() | TIER_COUNTS,
    COUNTS,
)
HEARTBEAT_REPLIES = st.builds(HeartbeatReply, st.sampled_from(NodeStatus), COUNTS, st.booleans())
ROUTED = st.builds(PutRoute, st.just(PutOutcome.ROUTED), st.sampled_from("abc"), TIERS, st.just("somewhere"))
PUT_ROUTES = st.lists(
    ROUTED | st.sampled_from([PutRoute(PutOutcome.UNAVAILABLE), PutRoute(PutOutcome.ALREADY_EXISTS)]), max_size=8
)
GET_ROUTES = st.lists(st.none() | st.builds(GetRoute, st.sampled_from("abc"), TIERS, SIZES, st.just("x")), max_size=8)
ACTIONS = st.builds(Action, st.sampled_from([ActionKind.REPORT, ActionKind.REVOKE]), TIERS, HASHES) | st.builds(
    Action, st.just(ActionKind.CLEAR), TIERS, st.just([])
)
BATCHES = st.builds(Batch, COUNTS, COUNTS, st.lists(ACTIONS, max_size=5), st.booleans())
ACKNOWLEDGEMENTS = st.builds(Acknowledgement, st.sampled_from(Verdict), COUNTS, COUNTS, st.booleans())
RUNS = st.lists(st.builds(TierRun, TIERS, st.integers(0, 2**32 - 1)), max_size=4)
PREFIXES = st.lists(st.builds(PrefixMatch, NAMES, st.integers(0, 2**32 - 1), RUNS, NUMBERS), max_size=5)
HIT_COUNTS = st.lists(st.tuples(KEYS, SIZES), max_size=8)
PAGES = st.builds(BlockPage, HASHES, COUNTS)
CHANGES = st.builds(Change, COUNTS, st.sampled_from(ChangeKind), NAMES, TIERS, HASHES.map(tuple), st.just(0.0), NAMES)
FEED_PAGES = st.builds(FeedPage, COUNTS, st.lists(CHANGES, max_size=5), COUNTS, st.booleans())
EXPLANATIONS = st.builds(
    HashExplanation,
    NAMES,
    st.sampled_from(NodeStatus),
    st.lists(TIERS, max_size=4).map(tuple),
    st.lists(st.builds(HashChange, TIERS, NAMES, NUMBERS, NAMES), max_size=4).map(tuple),
    NAMES,
)
HISTOGRAMS = st.lists(st.tuples(NUMBERS, SIZES), max_size=5).flatmap(
    lambda pairs: st.builds(
        HistogramDelta,
        st.just(tuple(bound for bound, _ in pairs)),
        st.just(tuple(count for _, count in pairs)),
        COUNTS,
        NUMBERS,
    )
)
SAMPLES = st.lists(
    st.builds(
        MetricSample,
        NAMES,
        st.builds(CounterDelta, NUMBERS) | st.builds(GaugeValue, NUMBERS) | HISTOGRAMS,
        NAMES,
        st.lists(st.tuples(NAMES, NAMES), max_size=3).map(tuple),
    ),
    max_size=5,
)
NODES = st.lists(
    st.builds(
        NodeInfo,
        NAMES,
        st.sampled_from(NodeStatus),
        NAMES,
        NAMES,
        TAGS,
        COUNTS,
        CAPACITIES,
        NUMBERS,
        TIER_COUNTS,
        TIER_COUNTS,
    ),
    max_size=4,
)


@st.composite
def positions(draw: st.DrawFn) -> tuple[list[bytes], list[PositionMatch]]:
    """A query, and what some nodes hold of it."""
    hashes = draw(st.lists(KEYS, min_size=1, max_size=40))
    flags = st.lists(st.booleans(), min_size=len(hashes), max_size=len(hashes))
    tiers = st.dictionaries(TIERS, flags.map(pack_bitmap), min_size=1, max_size=4)
    nodes = draw(st.lists(NAMES, unique=True, max_size=5))
    return hashes, [PositionMatch(node, draw(tiers)) for node in nodes]
