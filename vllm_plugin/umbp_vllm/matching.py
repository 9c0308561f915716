"""What of a request's prefix the pool can give, and the promise that it stays there.

A match is staged: its copies are pinned, and blocks that come from SSD get a DRAM page to pass through, so
that the number told to vLLM is one that can really be loaded.  A staged match holds until it is
loaded, replaced, given up or too old.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from umbp_core.directory import Copy
from umbp_core.errors import StateError
from umbp_core.ids import key_suffix
from umbp_core.ops import BlockCopy
from umbp_core.tiers import Tier
from umbp_vllm.directories import Holds, Read
from umbp_vllm.groups import KvGroup


class BlockHashes(Protocol):
    """What the matcher needs of a vLLM request."""

    @property
    def block_hashes(self) -> Sequence[bytes]:
        """The engine's hashes of all complete hash units, in order."""
        ...

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        ...


class RequestKeys:
    """The block keys of one request, per group, made once as its hashes grow."""

    __slots__ = ("_groups", "_keys", "_request")

    def __init__(self, request: BlockHashes, groups: Sequence[KvGroup]) -> None:
        self._request = request
        self._groups = groups
        self._keys: list[list[bytes]] = [[] for _ in groups]

    def of(self, group: KvGroup) -> list[bytes]:
        """The keys of all complete blocks of ``group`` whose tokens are known."""
        keys = self._keys[group.index]
        hashes = self._request.block_hashes
        each = group.hashes_per_block
        if len(hashes) // each > len(keys):
            suffix = key_suffix(group.index)
            keys += [block_hash + suffix for block_hash in hashes[(len(keys) + 1) * each - 1 :: each]]
        return keys


class StagedBlock(msgspec.Struct, frozen=True):
    """One block of a staged match: where its bytes are and the DRAM page they come through."""

    key: bytes
    group: int
    index: int
    source: Copy
    dram_page: int


class StagedMatch(msgspec.Struct, frozen=True):
    """A pinned match of tokens ``start`` (included) to ``end`` (excluded) under owner ``op_id``."""

    op_id: str
    start: int
    end: int
    blocks: tuple[StagedBlock, ...]
    since: float

    @property
    def tokens(self) -> int:
        """Tokens that the pool gives beyond ``start``."""
        return self.end - self.start

    @property
    def in_dram(self) -> bool:
        """Whether no block has to be read from SSD."""
        return all(block.source.tier is Tier.DRAM for block in self.blocks)

    def tokens_from_ssd(self, groups: Sequence[KvGroup]) -> int:
        """Tokens whose KV comes from SSD, judged by the group that needs the most blocks from there."""
        counts = [0] * len(groups)
        for block in self.blocks:
            if block.source.tier is Tier.SSD:
                counts[block.group] += 1
        if not any(counts):
            return 0
        return min(self.tokens, max(count * group.block_tokens for count, group in zip(counts, groups, strict=True)))


class Matcher:
    """Finds and stages matches in ``directory``.  Scheduler thread only.

    ``alignment`` is the token granularity of a hit (the least common multiple of all block sizes).
    """

    def __init__(
        self,
        directory: Read,
        groups: Sequence[KvGroup],
        alignment: int,
        object_bytes: Sequence[int],
        new_op_id: Callable[[], str],
    ) -> None:
        self._directory = directory
        self._groups = groups
        self._windowed = [group for group in groups if group.reach is not None or group.chunk is not None]
        self.alignment = alignment
        self._object_bytes = object_bytes
        self._new_op_id = new_op_id

    def most(self, num_tokens: int) -> int:
        """How many tokens of a request of ``num_tokens`` a load may bring.

        When it brings all of them, vLLM computes the last one again, and in a group with a window that token sees
        one token further back than the next one would: what it sees may be neither loaded nor allocated.
        """
        return num_tokens - 1 if self._windowed else num_tokens

    def longest(self, keys: RequestKeys, start: int, limit: int, among: Holds | None = None) -> int:
        """The largest ``end`` <= ``limit`` such that tokens ``start`` to ``end`` can be loaded; ``start`` if none.

        Pure.  ``start`` is what vLLM holds itself, in every group, and a multiple of the alignment.
        ``among`` stands for what is there, if not the directory does.
        """
        there: Holds = self._directory if among is None else among
        end = limit - limit % self.alignment
        for group in self._groups:
            first = start // group.block_tokens
            known = keys.of(group)
            last = min(end // group.block_tokens, len(known))
            if group.reach is None and group.chunk is None:
                last = first + there.count_prefix(known[first:last]) if last > first else first
            end = min(end, last * group.block_tokens)
            end -= end % self.alignment
        windowed = self._windowed
        if not windowed:
            return max(end, start)
        runs = {
            group.index: self._runs(there, keys.of(group), start // group.block_tokens, end, group)
            for group in windowed
        }
        while end > start and not all(self._window_present(group, runs[group.index], start, end) for group in windowed):
            end -= self.alignment
        return max(end, start)

    @staticmethod
    def _runs(there: Holds, known: Sequence[bytes], first: int, end: int, group: KvGroup) -> list[int]:
        """For each block from ``first``: how many present blocks in a row end with it."""
        runs = []
        run = 0
        for present in there.contains_many(known[first : end // group.block_tokens]):
            run = run + 1 if present else 0
            runs.append(run)
        return runs

    @staticmethod
    def _window_present(group: KvGroup, runs: Sequence[int], start: int, end: int) -> bool:
        first = start // group.block_tokens
        last = end // group.block_tokens
        needed = last - max(group.first_block_needed(end), first)
        return needed <= 0 or runs[last - first - 1] >= needed

    def keys_needed(self, keys: RequestKeys, start: int, end: int) -> list[bytes]:
        """The keys of the blocks that a load of ``start`` to ``end`` must bring."""
        return [key for _, _, run in self._runs_needed(keys, start, end) for key in run]

    def _runs_needed(self, keys: RequestKeys, start: int, end: int) -> list[tuple[KvGroup, int, list[bytes]]]:
        """The blocks that a load must bring, per group: the first one's index, and all keys from there on."""
        needed = []
        for group in self._groups:
            first = max(group.first_block_needed(end), start // group.block_tokens)
            needed.append((group, first, keys.of(group)[first : end // group.block_tokens]))
        return needed

    def stage(self, keys: RequestKeys, start: int, end: int, now: float) -> StagedMatch | None:
        """Pin the match that :meth:`longest` found to reach ``end``; ``None`` when nothing is left of it.

        A block on SSD for which no DRAM page is free ends the match before it.
        """
        while end > start:
            op_id = self._new_op_id()
            staged: list[StagedBlock] = []
            short = self._pin(op_id, self._runs_needed(keys, start, end), staged)
            if short is None:
                return StagedMatch(op_id, start, end, tuple(staged), now)
            self.release(op_id)
            end = self.longest(keys, start, min(short, end - 1))
        return None

    def _pin(
        self, op_id: str, needed: Sequence[tuple[KvGroup, int, list[bytes]]], staged: list[StagedBlock]
    ) -> int | None:
        """Pin ``needed`` into ``staged``; the token where it had to stop, or ``None`` if all went in."""
        copies = iter(self._directory.pin(op_id, [key for _, _, run in needed for key in run]))
        for group, first, run in needed:
            for block, (key, copy) in enumerate(zip(run, copies, strict=False), first):
                page = copy.pages[0] if copy.tier is Tier.DRAM else self._page_for(op_id, key, group, block)
                if page is None:
                    return block * group.block_tokens
                staged.append(StagedBlock(key, group.index, block, copy, page))
        return None

    def _page_for(self, op_id: str, key: bytes, group: KvGroup, block: int) -> int | None:
        if self._directory.is_present_or_pending(key, Tier.DRAM):
            return None
        pages = self._directory.reserve(op_id, key, Tier.DRAM, self._object_bytes[group.index], block)
        return None if pages is None else pages[0]

    def touch(self, keys: RequestKeys, end: int) -> None:
        """The first ``end`` tokens are being used, whoever gives them: what the engine holds itself counts too."""
        for group in self._groups:
            self._directory.touch(keys.of(group)[: end // group.block_tokens])

    def release(self, op_id: str) -> None:
        """Give up everything that ``op_id`` holds: pins and pages that were not published."""
        self._directory.abort_owner(op_id)
        self._directory.unpin(op_id)

    def load_blocks(
        self, match: StagedMatch, tokens: int, hbm_blocks: Sequence[Sequence[int]]
    ) -> tuple[BlockCopy, ...]:
        """The copies that load the first ``tokens`` of ``match`` into the request's block tables.

        ``hbm_blocks`` holds, per group, the request's *whole* block list, so that a position is never
        guessed from what was appended.  Raises ``StateError`` when more is asked for than was staged, or a
        block table is too short.
        """
        if tokens > match.tokens or (tokens < match.tokens and self._windowed):
            raise StateError(f"op {match.op_id}: vLLM wants {tokens} external tokens, {match.tokens} were promised")
        end = match.start + tokens
        copies = []
        for block in match.blocks:
            if (block.index + 1) * self._groups[block.group].block_tokens > end:
                continue
            table = hbm_blocks[block.group]
            if block.index >= len(table):
                raise StateError(
                    f"op {match.op_id}: block {block.index} of group {block.group} lies beyond its table of "
                    f"{len(table)} blocks"
                )
            source = block.source
            ssd_slot = source.pages[0] if source.tier is Tier.SSD else -1
            copies.append(
                BlockCopy(
                    block.key, block.group, table[block.index], block.dram_page, ssd_slot, checksums=source.checksum
                )
            )
        return tuple(copies)
