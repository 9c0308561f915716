"""What becomes of a prompt's blocks, judged from what is known of each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_connectors.why import BlockFacts, Judgement, Verdict, judge
from umbp_core.master.model import HashChange
from umbp_core.tiers import Tier

HBM, DRAM, SSD = Tier.HBM, Tier.DRAM, Tier.SSD
BLOCK = 10


def facts(*tiers: tuple[Tier, ...]) -> list[BlockFacts]:
    return [BlockFacts(b"%d" % number, each) for number, each in enumerate(tiers)]


def lots(judgement: Judgement) -> list[tuple[str, str]]:
    """Verdict and source of each block."""
    return [(b.verdict.value, "" if b.source is None else Tier(b.source).name) for b in judgement.blocks]


def test_hbm_first_then_the_pool_and_the_rest_is_computed() -> None:
    found = judge(facts((HBM, DRAM), (HBM,), (DRAM, SSD), (SSD,), ()), 55, BLOCK)
    assert lots(found) == [("used", "HBM"), ("used", "HBM"), ("used", "DRAM"), ("used", "SSD"), ("missing", "")]
    assert found.reused_tokens == 40
    assert found.summary() == (
        "40 of 55 tokens would be reused (2 from HBM, 1 from DRAM, 1 from SSD of 5 blocks); 15 are computed, "
        "from block 4 on: never stored here, or longer ago than the master remembers"
    )


def test_behind_a_hole_nothing_counts() -> None:
    found = judge(facts((DRAM,), (), (DRAM,), (HBM, DRAM)), 45, BLOCK)
    assert [verdict for verdict, _ in lots(found)] == ["used", "missing", "behind a hole", "behind a hole"]
    assert found.blocks[2].reason == "there, but behind a hole at block 1"


def test_hbm_counts_from_the_beginning_only() -> None:
    found = judge(facts((DRAM,), (HBM,), (DRAM,)), 35, BLOCK)
    assert [verdict for verdict, _ in lots(found)] == ["used", "behind a hole", "behind a hole"]
    assert found.blocks[1].reason.startswith("in HBM only")


def test_a_load_of_few_blocks_is_not_worth_it() -> None:
    found = judge(facts((HBM,), (DRAM,), (SSD,), ()), 45, BLOCK, min_load_blocks=3)
    assert [verdict for verdict, _ in lots(found)] == ["used", "too few", "too few", "missing"]
    assert found.blocks[1].reason == "a load of 2 blocks is less than min_load_blocks (3)"
    assert judge(facts((HBM,), (DRAM,), (SSD,), ()), 45, BLOCK, min_load_blocks=2).reused_tokens == 30


@pytest.mark.parametrize(
    ("tiers", "verdicts"),
    [
        ([(DRAM,)] * 3, ["open"] * 3),
        ([(SSD,)] * 3, ["too few"] * 3),
        ([(DRAM, SSD), (SSD,), (DRAM, SSD)], ["open", "too few", "too few"]),
        ([(SSD,)] * 4, ["used"] * 4),
        ([(DRAM,)] * 4, ["used"] * 4),
        ([(DRAM,), (SSD,), (SSD,), (SSD,), (SSD,)], ["used"] * 5),
        ([(DRAM,)] * 3 + [(SSD,)], ["used"] * 3 + ["open"]),
    ],
    ids=str,
)
def test_of_sglang_some_answers_stay_open(tiers: list[tuple[Tier, ...]], verdicts: list[str]) -> None:
    """Its host pool gives back whatever it has, its storage no less than four pages; both are DRAM for a master."""
    found = judge(facts((HBM, DRAM), *tiers), (1 + len(tiers)) * BLOCK + 5, BLOCK, "sglang", min_load_blocks=4)
    assert [verdict for verdict, _ in lots(found)] == ["used", *verdicts]
    assert found.reused_tokens == (1 + verdicts.count("used")) * BLOCK
    assert (f"perhaps {verdicts.count('open') * BLOCK} more" in found.summary()) == ("open" in verdicts)


@pytest.mark.parametrize(
    ("engine", "last", "tokens", "verdict", "reused"),
    [
        ("vllm", (HBM,), 20, "last token", 10),
        ("vllm", (HBM, DRAM), 20, "used", 19),
        ("vllm", (DRAM,), 20, "used", 19),
        ("vllm", (HBM,), 21, "used", 20),
        ("sglang", (HBM, DRAM), 20, "last token", 10),
        ("sglang", (DRAM,), 20, "last token", 10),
        ("sglang", (DRAM,), 21, "used", 20),
    ],
)
def test_the_last_token_is_computed(
    engine: str, last: tuple[Tier, ...], tokens: int, verdict: str, reused: int
) -> None:
    found = judge(facts((HBM, DRAM), last), tokens, BLOCK, engine)
    assert (found.blocks[-1].verdict.value, found.reused_tokens) == (verdict, reused)


def test_a_short_prompt_has_no_block() -> None:
    found = judge([], 7, BLOCK)
    assert found.reused_tokens == 0
    assert found.summary() == "0 of 7 tokens would be reused: a prompt of less than 10 tokens has no full block"
    assert judge([], 0, BLOCK).reused_tokens == 0


def test_what_is_missing_says_where_it_went_and_who_has_it() -> None:
    gone = BlockFacts(b"a", (), (HashChange(DRAM, "revoked", 3.25, ""), HashChange(HBM, "revoked", 9.0, "")), ("n2",))
    cleared = BlockFacts(b"b", (), (HashChange(HBM, "cleared", 600.0, "expired"),))
    found = judge([gone, cleared], 25, BLOCK)
    assert found.blocks[0].reason == "left DRAM 3.2 s ago; held by n2, which this engine does not read from"
    assert found.blocks[1].reason == "HBM was cleared 10 min ago (expired)"


def test_equal_lots_in_a_row_are_shown_as_one() -> None:
    found = judge(facts((HBM,), (HBM,), (DRAM,), (), ()), 55, BLOCK)
    assert [(first.index, last.index) for first, last in found.runs()] == [(0, 1), (2, 2), (3, 4)]


def test_all_used_but_a_tail() -> None:
    assert judge(facts((HBM,)), 13, BLOCK).summary() == (
        "10 of 13 tokens would be reused (1 from HBM of 1 blocks); 3 are computed: they fill no block"
    )


def test_a_storage_of_each_rank_counts_as_far_as_all_have_it() -> None:
    blocks = [
        *facts((HBM, DRAM, SSD), (SSD,), (SSD,)),
        BlockFacts(b"3", (DRAM, SSD), lacking=("tp1",)),
        *facts((SSD,)),
        BlockFacts(b"5", (SSD,), lacking=("tp1", "tp2")),
        *facts((DRAM,)),
    ]
    found = judge(blocks, 75, BLOCK, "sglang")
    verdicts = [block.verdict.value for block in found.blocks]
    assert verdicts == ["used", "used", "used", "open", "open", "missing", "behind a hole"]
    assert found.blocks[3].reason == found.blocks[4].reason
    assert found.blocks[3].reason == (
        "used if block 3 is in SGLang's host pool: tp1 has no part of it, and every rank reads its own"
    )
    assert found.blocks[5].reason == "on SSD here, but tp1, tp2 have no part of it, and every rank reads its own"
    assert judge([BlockFacts(b"0", (HBM,), lacking=("tp1",))], 15, BLOCK, "sglang").reused_tokens == 10


def test_of_layers_that_nobody_tells_of_the_answer_is_a_bound() -> None:
    found = judge(facts((HBM,), (DRAM,), ()), 35, BLOCK, at_most=True)
    assert found.reused_tokens == 20
    assert found.summary() == (
        "at most 20 of 35 tokens would be reused (1 from HBM, 1 from DRAM of 3 blocks), if the windows or states of "
        "its other layers are there too; at least 15 are computed, from block 2 on: never stored here, or longer ago "
        "than the master remembers"
    )
    assert judge(facts(()), 15, BLOCK, at_most=True).summary().startswith("0 of 15 tokens would be reused; 15 are")


@given(
    st.lists(st.tuples(st.sets(st.sampled_from([HBM, DRAM, SSD])), st.booleans()), max_size=8),
    st.integers(0, BLOCK - 1),
    st.integers(1, 4),
    st.sampled_from(["vllm", "sglang"]),
)
def test_what_is_used_is_a_beginning_and_there(
    places: list[tuple[set[Tier], bool]], tail: int, least: int, engine: str
) -> None:
    blocks = [BlockFacts(b"%d" % n, tuple(sorted(on)), lacking=("tp1",) * bad) for n, (on, bad) in enumerate(places)]
    tokens = len(blocks) * BLOCK + tail
    found = judge(blocks, tokens, BLOCK, engine, least)
    used = [block.verdict is Verdict.USED for block in found.blocks]
    assert used == sorted(used, reverse=True)
    assert all((block.source in block.facts.tiers) == (block.verdict is Verdict.USED) for block in found.blocks)
    assert found.reused_tokens < tokens or tokens == 0
    assert all(block.reason for block in found.blocks)
    assert sum(last.index - first.index + 1 for first, last in found.runs()) == len(blocks)
    assert not any(block.facts.lacking for block in found.blocks if block.source is SSD)
