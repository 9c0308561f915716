"""What of a request's prefix the pool can give, and the promise that it stays there.

A match is staged: its copies are pinned, and blocks that come from SSD get a DRAM page to pass through, so
that the number told to vLLM is one that can really be loaded.  A staged match holds until it is
loaded, replaced, given up or too old.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import msgspec

from umbp_core.directory import Copy
from umbp_core.errors import StateError
from umbp_core.ids import GROUP_BYTES, key_suffix
from umbp_core.ops import BlockCopy
from umbp_core.tiers import Tier
from umbp_vllm.adapters import AdapterKey
from umbp_vllm.directories import Holds, Read
from umbp_vllm.groups import KvGroup

_ADAPTER_BYTES = 32

_Run: TypeAlias = "tuple[KvGroup, int, list[bytes]]"
"""Neighbouring blocks: their group, the index of the first, and their keys."""


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
    """The block keys of one request, per group, made once as its hashes grow.

    Those of a request with an ``adapter`` begin with what that is; there are none before it is known.
    """

    __slots__ = ("_adapter", "_groups", "_keys", "_request")

    def __init__(self, request: BlockHashes, groups: Sequence[KvGroup], adapter: AdapterKey | None = None) -> None:
        self._request = request
        self._groups = groups
        self._adapter = adapter
        self._keys: list[list[bytes]] = [[] for _ in groups]

    @property
    def are_known(self) -> bool:
        """Whether there are keys, which may still become known unless :attr:`are_refused`."""
        return self._adapter is None or (self._adapter.prefix is not None and not self._adapter.refused)

    @property
    def are_refused(self) -> bool:
        """Whether nothing of the request may be loaded or stored."""
        return self._adapter is not None and self._adapter.refused

    def of(self, group: KvGroup) -> list[bytes]:
        """The keys of all complete blocks of ``group`` whose tokens are known."""
        if self._adapter is not None and not self.are_known:
            return []
        keys = self._keys[group.index]
        hashes = self._request.block_hashes
        each = group.hashes_per_block
        if len(hashes) // each > len(keys):
            new = self._bare(group, len(keys))
            prefix = self._adapter.prefix if self._adapter is not None else None
            keys += new if prefix is None else [prefix + key for key in new]
        return keys

    def bare(self, group: KvGroup, count: int) -> list[bytes]:
        """The first ``count`` keys of ``group`` as :func:`bare` makes them, known or not."""
        return self.of(group)[:count] if self._adapter is None else self._bare(group, 0)[:count]

    def _bare(self, group: KvGroup, first: int) -> list[bytes]:
        suffix, each = key_suffix(group.index), group.hashes_per_block
        return [block_hash + suffix for block_hash in self._request.block_hashes[(first + 1) * each - 1 :: each]]


def bare(key: bytes) -> bytes:
    """``key`` without what it says of an adapter: vLLM's block hash, which has at most 32 bytes, and the group."""
    return key[_ADAPTER_BYTES:] if len(key) > _ADAPTER_BYTES + GROUP_BYTES else key


def block_hash_of(key: bytes) -> bytes:
    """The engine's block hash in ``key``."""
    return bare(key)[:-GROUP_BYTES]


class StagedRun(msgspec.Struct, frozen=True, gc=False):
    """Neighbouring blocks of ``group``, the index of the first one ``first``.

    ``copies`` say where their bytes are, ``pages`` the DRAM pages that they come through.
    """

    group: KvGroup
    first: int
    keys: Sequence[bytes]
    copies: Sequence[Copy]
    pages: list[int]

    def last(self, end: int) -> int:
        """The index behind the last of its blocks that a token before ``end`` lies in."""
        return max(self.first, min(-(-end // self.group.block_tokens), self.first + len(self.keys)))


class StagedMatch(msgspec.Struct, frozen=True, gc=False):
    """A pinned match of tokens ``start`` (included) to ``end`` (excluded) under owner ``op_id``.

    ``in_dram`` says that no block has to be read from SSD.
    """

    op_id: str
    start: int
    end: int
    runs: Sequence[StagedRun]
    since: float
    in_dram: bool

    @property
    def tokens(self) -> int:
        """Tokens that the pool gives beyond ``start``."""
        return self.end - self.start

    def reaches(self, end: int) -> bool:
        """Whether the blocks that a request needs at ``end`` tokens are among those that it has.

        It has those of its own ``end``: where that is further on, the window of a group may begin behind them.
        """
        if end >= self.end:
            return end == self.end
        return all(
            max(run.group.first_block_needed(end), self.start // run.group.block_tokens) >= run.first
            for run in self.runs
        )

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return sum(len(run.keys) for run in self.runs)

    @property
    def tokens_from_ssd(self) -> int:
        """Tokens whose KV comes from SSD, judged by the group that needs the most blocks from there."""
        if self.in_dram:
            return 0
        most = max(sum(copy.tier is Tier.SSD for copy in run.copies) * run.group.block_tokens for run in self.runs)
        return min(self.tokens, most)


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

    def _runs_needed(self, keys: RequestKeys, start: int, end: int) -> list[_Run]:
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
            needed = self._runs_needed(keys, start, end)
            copies = self._directory.pin(op_id, itertools.chain.from_iterable([keys for _, _, keys in needed]))
            in_dram = [copy.tier for copy in copies].count(Tier.DRAM) == len(copies)
            match = StagedMatch(op_id, start, end, _staged(needed, copies), now, in_dram)
            short = None if in_dram else self._find_pages(match)
            if short is None:
                return match
            self.release(op_id)
            end = self.longest(keys, start, min(short, end - 1))
        return None

    def _find_pages(self, match: StagedMatch) -> int | None:
        """Give what comes from SSD its page to come through; the token where there is none, or ``None``."""
        for run in match.runs:
            for number, copy in enumerate(run.copies):
                if copy.tier is not Tier.DRAM:
                    page = self._page_for(match.op_id, run.keys[number], run.group, run.first + number)
                    if page is None:
                        return (run.first + number) * run.group.block_tokens
                    run.pages[number] = page
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
        guessed from what was appended.  A block of which a part is asked for is loaded whole; the request computes
        the rest of it over what came.  Raises ``StateError`` when what is asked for needs more than was staged, or
        a block table is too short.
        """
        end = match.start + tokens
        if not match.reaches(end):
            raise StateError(f"op {match.op_id}: vLLM wants {tokens} external tokens, {match.tokens} were promised")
        blocks: list[BlockCopy] = []
        for run in match.runs:
            group, last, table = run.group.index, run.last(end), hbm_blocks[run.group.index]
            if last > len(table):
                raise StateError(
                    f"op {match.op_id}: block {last - 1} of group {group} lies beyond its table of {len(table)} blocks"
                )
            places = zip(run.keys, table[run.first : last], run.pages, run.copies, strict=False)
            blocks += [
                BlockCopy(key, group, block, page, copy.pages[0] if copy.tier is Tier.SSD else -1, copy.checksum)
                for key, block, page, copy in places
            ]
        return tuple(blocks)


def _staged(needed: Iterable[_Run], copies: Sequence[Copy]) -> list[StagedRun]:
    """The runs with their ``copies``, each at the page where it is."""
    runs = []
    done = 0
    for group, first, keys in needed:
        mine = copies[done : done + len(keys)]
        done += len(keys)
        runs.append(StagedRun(group, first, keys, mine, [copy.pages[0] for copy in mine]))
    return runs
