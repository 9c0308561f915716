"""Events summed up: whatever waits, and however often it was folded, the words are those of the events one by one."""

from __future__ import annotations

import threading
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, StorageMedium

from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.holdings import Holdings
from umbp_core.tiers import Tier
from umbp_sglang.placements import Placements

GPU, CPU = StorageMedium.GPU, StorageMedium.CPU
TIERS = {GPU: Tier.HBM, CPU: Tier.DRAM}


def stored(medium: StorageMedium | None, *hashes: int) -> BlockStored:
    return BlockStored(
        block_hashes=list(hashes), parent_block_hash=None, token_ids=[1], block_size=1, lora_id=None, medium=medium
    )


def removed(medium: StorageMedium | None, *hashes: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(hashes), medium=medium)


def told(held: Holdings, words: list[Word]) -> dict[int, set[bytes]]:
    for kind, tier, hashes in words:
        if kind is WordKind.ADD:
            held.add("x", tier, hashes)
        elif kind is WordKind.REMOVE:
            held.remove("x", tier, hashes)
        elif kind is WordKind.CLEAR:
            held.clear("x", tier)
        else:
            held.replace("x", tier, hashes)
    return {tier: set(hashes) for tier, hashes in held.snapshot()}


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[str, object]]:
    """Balanced events, as SGLang sends them: only what is stored is removed; and what the two threads do meanwhile."""
    nodes: Counter[tuple[StorageMedium, int]] = Counter()
    stream: list[tuple[str, object]] = []
    for _ in range(draw(st.integers(1, 25))):
        doing = draw(st.sampled_from(["store", "store", "remove", "clear", "fold", "decode"]))
        if doing == "store":
            medium, block = draw(st.sampled_from([GPU, CPU])), draw(st.integers(-3, 3))
            nodes[medium, block] += 1
            stream.append(("events", [stored(medium, block)]))
        elif doing == "remove" and +nodes:
            medium, block = draw(st.sampled_from(sorted(+nodes)))
            nodes[medium, block] -= 1
            stream.append(("events", [removed(medium, block)]))
        elif doing == "clear" and draw(st.booleans()):
            nodes.clear()
            stream.append(("events", [AllBlocksCleared(), stored(GPU, 9)]))
            nodes[GPU, 9] += 1
        elif doing in ("fold", "decode"):
            stream.append((doing, None))
    return stream


@given(streams())
def test_words_are_the_truth_of_the_events(stream: list[tuple[str, object]]) -> None:
    placements, held = Placements(), Holdings()
    truth: dict[Tier, Counter[int]] = {Tier.HBM: Counter(), Tier.DRAM: Counter()}
    items: list[str] = []
    for doing, events in [*stream, ("decode", None)]:
        if doing == "events":
            for event in events:  # type: ignore[attr-defined]
                if isinstance(event, AllBlocksCleared):
                    [counts.clear() for counts in truth.values()]
                else:
                    truth[TIERS[event.medium]].update(
                        dict.fromkeys(event.block_hashes, 1 if isinstance(event, BlockStored) else -1)
                    )
            placements.note(events)  # type: ignore[arg-type]
            items.append("")
        elif doing == "fold":
            items = [placements.fold()]
        else:
            for item in items:
                found = told(held, list(placements.decode(item)))
            items = []
    found = {tier: set(hashes) for tier, hashes in held.snapshot()}
    assert found == {tier.value: {b"%d" % block for block in +counts} for tier, counts in truth.items() if +counts}
    assert placements.unbalanced == 0


def test_a_block_is_there_while_any_node_has_it() -> None:
    placements = Placements()
    placements.note([stored(GPU, 7), stored(GPU, 7)])
    assert list(placements.decode("")) == [Word(WordKind.ADD, Tier.HBM, [b"7"])]
    placements.note([removed(GPU, 7)])
    assert list(placements.decode("")) == []
    placements.note([removed(GPU, 7)])
    assert list(placements.decode("")) == [Word(WordKind.REMOVE, Tier.HBM, [b"7"])]


def test_a_block_without_a_medium_is_on_the_device_and_other_media_are_not_ours() -> None:
    placements = Placements()
    placements.note([stored(None, 1), stored(StorageMedium.DISK, 2), stored(StorageMedium.EXTERNAL, 3)])
    placements.note([stored("CPU_PINNED", 4), removed(StorageMedium.DISK, 2)])  # type: ignore[arg-type]
    assert list(placements.decode("")) == [Word(WordKind.ADD, Tier.HBM, [b"1"]), Word(WordKind.ADD, Tier.DRAM, [b"4"])]
    assert placements.unbalanced == 0


def test_an_event_that_is_unknown_weighs_nothing() -> None:
    placements = Placements()
    assert placements.note([object(), stored(GPU, 1, 2), AllBlocksCleared()]) == 2
    assert [word.kind for word in placements.decode("")] == [WordKind.CLEAR, WordKind.CLEAR]


def test_what_waits_is_bounded_by_what_the_caches_hold_and_nothing_is_lost() -> None:
    """The reporter does not read for a while: the feed overflows again and again, and only net effects are kept."""
    placements = Placements()
    feed = Feed("caches", placements.decode, placements.fold, threading.Event(), max_waiting=100)
    for number in range(3000):
        events = [stored(GPU, number), *([removed(GPU, number - 50)] if number >= 50 else [])]
        feed.tell(placements.note(events), "")
    waiting = sum(
        len(part.changes[Tier.HBM]) if not isinstance(part, list) else len(part) for part in placements._waiting
    )
    assert waiting < 400
    assert feed.counters.overflows > 10
    held = Holdings()
    for item in feed.take().items:
        found = told(held, list(placements.decode(item)))
    assert found == {Tier.HBM.value: {b"%d" % number for number in range(2950, 3000)}}
