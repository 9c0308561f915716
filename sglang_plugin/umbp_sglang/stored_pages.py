"""Which pages of L3 are on which tier, in the words of SGLang's event stream.

The reporter's thread owns it; what the pool's threads tell is in :mod:`umbp_sglang.pool_teller`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.tiers import Tier
from umbp_sglang.page_ids import Description, PageIds, published_form, short

TIERS = (Tier.DRAM, Tier.SSD)


class StoredPages:
    """The pages of the pool by their storage hashes, and what is told of them.

    Pages whose published id is not known are held and not told; when it becomes known, they are.
    """

    def __init__(self, ids: PageIds) -> None:
        self._ids = ids
        self._held: dict[bytes, int] = {}

    @property
    def untold(self) -> int:
        """Pages that are held and whose published id is not known."""
        return sum(self._ids.of(page) is None for page in self._held) if self._ids.unknown else 0

    def add(self, tier: Tier, keys: Sequence[bytes]) -> Word:
        """The pages ``keys`` came to ``tier``."""
        pages, held, bit = list(map(short, keys)), self._held, tier.bit
        for page in pages:
            held[page] = held.get(page, 0) | bit
        return Word(WordKind.ADD, tier, published_form(self._told(pages)))

    def remove(self, tier: Tier, keys: Sequence[bytes]) -> Word:
        """They left it."""
        pages, held, keep = list(map(short, keys)), self._held, ~tier.bit
        for page in pages:
            left = held.get(page, 0) & keep
            if left:
                held[page] = left
            else:
                held.pop(page, None)
        gone = self._told(pages)
        if len(self._ids):
            gone = [published for published in gone if not self._is_on(published, tier)]
        return Word(WordKind.REMOVE, tier, published_form(gone))

    def replace(self, holdings: Mapping[Tier, Sequence[bytes]]) -> list[Word]:
        """Exactly ``holdings`` are there."""
        self._held.clear()
        words = [self.add(tier, holdings.get(tier, ())) for tier in TIERS]
        return [word._replace(kind=WordKind.REPLACE) for word in words]

    def learn(self, descriptions: Iterable[Description]) -> list[Word]:
        """What is told otherwise than before, now that pages are described."""
        words: list[Word] = []
        for description in descriptions:
            for page, before in self._ids.learn(description):
                words += self._rename(page, before)
        self._ids.prune(self._held.__contains__)
        return words

    def _rename(self, page: bytes, before: bytes | None) -> list[Word]:
        words: list[Word] = []
        mask, now = self._held.get(page, 0), self._ids.of(page)
        for tier in TIERS:
            if not mask & tier.bit:
                continue
            if before is not None and not self._is_on(before, tier):
                words.append(Word(WordKind.REMOVE, tier, published_form([before])))
            if now is not None:
                words.append(Word(WordKind.ADD, tier, published_form([now])))
        return words

    def _told(self, pages: list[bytes]) -> list[bytes]:
        if not len(self._ids):
            return pages
        return [published for published in map(self._ids.of, pages) if published is not None]

    def _is_on(self, published: bytes, tier: Tier) -> bool:
        return any(self._held.get(page, 0) & tier.bit for page in self._ids.pages_of(published))
