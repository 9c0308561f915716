"""Why a prompt's KV would be used or computed again, block by block.  Pure: it judges what others found out.

An engine reuses a prompt from its beginning on: first what lies in HBM, up to the first block that does not; from there
on what its pool has in DRAM or on SSD, up to the first block that it does not have.  The last token is always computed.

SGLang has two of these: the host pool beside its device (L2), which gives back whatever it has, and behind it the
storage (L3), from which few blocks are not worth a read.  Both are DRAM for a master, so that some answers stay open.
Its ranks have a storage each, and a block counts as far as all of them have their part.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from umbp_core.master.model import HashChange
from umbp_core.tiers import Tier

_POOL = (Tier.DRAM, Tier.SSD)
_WAYS = {
    "revoked": "left {tier} {age} ago",
    "cleared": "{tier} was cleared {age} ago{because}",
    "reported": "was on {tier} {age} ago",
}
_VLLM, _SGLANG = "vllm", "sglang"


class Verdict(enum.Enum):
    """What becomes of a block."""

    USED = "used"
    MISSING = "missing"
    """It is nowhere on this node, or not on all of its ranks: the prompt is computed from here on."""
    BEHIND_A_HOLE = "behind a hole"
    """It is there, but one before it is not."""
    TOO_FEW = "too few"
    """It is in the pool, with fewer others than are worth a load."""
    OPEN = "open"
    """Nobody but the engine knows whether it lies where it would be used, or where there are too few."""
    LAST_TOKEN = "last token"
    """It is there, but its last token has to be computed, and the engine reuses whole blocks."""


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """What a master knows of one block: its tiers on the node, what changed last there, and who else has it.

    ``lacking`` are the engine's other ranks, nodes of their own, that have no part of it in their storage.
    """

    key: bytes
    tiers: tuple[int, ...] = ()
    changes: tuple[HashChange, ...] = ()
    """The latest first; only of blocks without tiers."""
    elsewhere: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JudgedBlock:
    """One block with what becomes of it.  ``source`` is the tier that it would be taken from, if it is used."""

    index: int
    facts: BlockFacts
    verdict: Verdict
    reason: str
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """The whole prompt."""

    prompt_tokens: int
    block_tokens: int
    blocks: tuple[JudgedBlock, ...]
    at_most: bool = False
    """The model has layers with windows or states, whose KV has to be there too, and a master is not told of it."""

    @property
    def reused_tokens(self) -> int:
        """Tokens that are not computed; with ``at_most``, as far as the layers go that a master is told of."""
        used = sum(block.verdict is Verdict.USED for block in self.blocks) * self.block_tokens
        return min(used, self.prompt_tokens - 1) if self.prompt_tokens else 0

    def runs(self) -> Iterator[tuple[JudgedBlock, JudgedBlock]]:
        """First and last of blocks in a row that have the same lot."""
        for _, group in groupby(self.blocks, key=_lot):
            run = list(group)
            yield run[0], run[-1]

    def summary(self) -> str:
        """One sentence or two."""
        reused, computed = self.reused_tokens, self.prompt_tokens - self.reused_tokens
        sources = [block.source for block in self.blocks if block.source is not None]
        where = ", ".join(f"{sources.count(tier)} from {Tier(tier).name}" for tier in sorted(set(sources)))
        most, least = ("at most ", "at least ") if self.at_most and reused else ("", "")
        text = f"{most}{reused} of {self.prompt_tokens} tokens would be reused"
        text += f" ({where} of {len(self.blocks)} blocks)" if where else ""
        text += ", if the windows or states of its other layers are there too" if most else ""
        unknown = sum(block.verdict is Verdict.OPEN for block in self.blocks) * self.block_tokens
        text += f", perhaps {unknown} more" if unknown else ""
        first = next((block for block in self.blocks if block.verdict is not Verdict.USED), None)
        if first is not None:
            return f"{text}; {least}{computed} are computed, from block {first.index} on: {first.reason}"
        if not self.blocks:
            return f"{text}: a prompt of less than {self.block_tokens} tokens has no full block"
        tail = self.prompt_tokens - len(self.blocks) * self.block_tokens
        return f"{text}; {least}{computed} are computed: {'they fill no block' if tail else 'the last token always is'}"


def judge(
    blocks: Sequence[BlockFacts],
    prompt_tokens: int,
    block_tokens: int,
    engine: str = _VLLM,
    min_load_blocks: int = 1,
    at_most: bool = False,
) -> Judgement:
    """What becomes of each of ``blocks``, the full blocks of a prompt of ``prompt_tokens`` tokens on one node.

    ``min_load_blocks`` is how many blocks the engine loads at least (of SGLang: from its storage); ``at_most`` that its
    model has layers of which a master is not told.
    """
    from_hbm = _leading(blocks, 0, (Tier.HBM,))
    loaded = _leading(blocks, from_hbm, _POOL)
    whole = from_hbm + loaded == len(blocks) and len(blocks) * block_tokens == prompt_tokens
    if whole and loaded == 0 and blocks and engine == _VLLM and _source(blocks[-1], _POOL) is not None:
        from_hbm, loaded = from_hbm - 1, 1  # the engine never takes a prompt's last block from HBM; the pool has it
    too_few = 0 < loaded < min_load_blocks
    pool = _of_two_levels if engine == _SGLANG else _of_the_pool
    judged = []
    for index, facts in enumerate(blocks):
        if index < from_hbm:
            judged.append(JudgedBlock(index, facts, Verdict.USED, "in HBM", Tier.HBM))
        elif index < from_hbm + loaded:
            judged.append(pool(blocks[from_hbm : from_hbm + loaded], from_hbm, index, min_load_blocks))
        else:
            judged.append(_unused(index, facts, from_hbm + loaded, too_few))
    if whole and judged and (engine != _VLLM or judged[-1].source is Tier.HBM):
        last = judged[-1]
        reason = "the last token is always computed, and the engine reuses whole blocks"
        judged[-1] = JudgedBlock(last.index, last.facts, Verdict.LAST_TOKEN, reason)
    return Judgement(prompt_tokens, block_tokens, tuple(judged), at_most)


def _of_the_pool(loaded: Sequence[BlockFacts], first: int, index: int, least: int) -> JudgedBlock:
    """What becomes of the block ``index``, one of those from ``first`` on that would be ``loaded`` together."""
    facts = loaded[index - first]
    if len(loaded) < least:
        reason = f"a load of {len(loaded)} blocks is less than min_load_blocks ({least})"
        return JudgedBlock(index, facts, Verdict.TOO_FEW, reason)
    source = Tier.DRAM if Tier.DRAM in facts.tiers else Tier.SSD
    return JudgedBlock(index, facts, Verdict.USED, f"in {source.name}", source)


def _of_two_levels(loaded: Sequence[BlockFacts], first: int, index: int, least: int) -> JudgedBlock:
    """The same for SGLang.  L2 has what is in DRAM, up to some block; what follows comes from L3."""
    facts = loaded[index - first]
    in_dram = _leading(loaded, 0, (Tier.DRAM,))
    from_ssd = len(loaded) - in_dram
    partial = next((place for place, each in enumerate(loaded[: index - first + 1]) if each.lacking), None)
    if partial is not None:
        reason = f"used if block {first + partial} is in SGLang's host pool: {_without(loaded[partial].lacking)}"
        return JudgedBlock(index, facts, Verdict.OPEN, reason)
    reason = f"SGLang reads no less than {least} blocks from its storage"
    if len(loaded) < least and index - first >= in_dram:
        return JudgedBlock(index, facts, Verdict.TOO_FEW, f"only {from_ssd} of these are on SSD: {reason}")
    if len(loaded) < least:
        return JudgedBlock(index, facts, Verdict.OPEN, f"used if in SGLang's host pool: {reason}")
    if from_ssd < least and index - first >= in_dram:
        return JudgedBlock(index, facts, Verdict.OPEN, f"used if enough before them are not in the host pool: {reason}")
    return _of_the_pool(loaded, first, index, least)


def _unused(index: int, facts: BlockFacts, hole: int, too_few: bool) -> JudgedBlock:
    if not facts.tiers:
        return JudgedBlock(index, facts, Verdict.MISSING, _missing(facts))
    if index == hole and facts.lacking and Tier.SSD in facts.tiers:
        return JudgedBlock(index, facts, Verdict.MISSING, f"on SSD here, but {_without(facts.lacking)}")
    what = "a load that is too short" if too_few else "a hole"
    reason = f"there, but behind {what} at block {hole}"
    if index == hole:  # not in the pool, so it is in HBM, behind the first block that is not
        reason = "in HBM only, behind a block that is not: HBM counts from the beginning on"
    return JudgedBlock(index, facts, Verdict.BEHIND_A_HOLE, reason)


def _without(ranks: Sequence[str]) -> str:
    return f"{', '.join(ranks)} {'has' if len(ranks) == 1 else 'have'} no part of it, and every rank reads its own"


def _missing(facts: BlockFacts) -> str:
    if facts.changes:
        latest = facts.changes[0]
        because = f" ({latest.reason})" if latest.reason else ""
        way = _WAYS.get(latest.kind, latest.kind + " {tier} {age} ago")
        text = way.format(tier=_name(latest.tier), age=_age(latest.age), because=because)
    else:
        text = "never stored here, or longer ago than the master remembers"
    if facts.elsewhere:
        text += f"; held by {', '.join(facts.elsewhere)}, which this engine does not read from"
    return text


def _leading(blocks: Sequence[BlockFacts], start: int, tiers: Sequence[Tier]) -> int:
    """How many blocks in a row from ``start`` on are on one of ``tiers``."""
    count = 0
    for facts in blocks[start:]:
        if _source(facts, tiers) is None:
            break
        count += 1
    return count


def _source(facts: BlockFacts, tiers: Sequence[Tier]) -> Tier | None:
    """The first of ``tiers`` that the block can come from; what is on SSD has to be so on all ranks."""
    return next((tier for tier in tiers if tier in facts.tiers and not (tier is Tier.SSD and facts.lacking)), None)


def _lot(block: JudgedBlock) -> tuple[object, ...]:
    """What blocks in a row have in common to be shown as one; ages differ by as little as their reports did."""
    kinds = [(change.tier, change.kind) for change in block.facts.changes[:1]]
    reason = "" if kinds else block.reason
    return block.verdict, reason, block.facts.tiers, kinds, block.facts.elsewhere, block.facts.lacking


def _name(tier: int) -> str:
    return next((known.name for known in Tier if known == tier), f"tier {tier}")


def _age(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
