"""Pages for stores: granted without keys and in advance, given to blocks without asking, published when written."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from umbp_connectors.daemon.pages import NewObject
from umbp_connectors.pool.outcomes import PutStatus
from umbp_core.tiers import Tier
from umbp_vllm.host_line import HostLine, RankStripes
from umbp_vllm.host_words import PublishAll, Published, Take, Taken

FIRST_STOCK = 64
"""Pages that are granted in advance at first; more, once these were too few."""
STOCK_PART = 8
"""The pool divided by this is the most that an engine has in stock, and twice as much with what it writes."""


@dataclass(slots=True)
class _Writing:
    """Pages that an op writes, by the key that they are for."""

    life: int
    blocks: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)
    """Page, bytes and depth."""


class HostStock:
    """The pages of one engine.  Scheduler thread only.  ``most`` bounds those granted in advance."""

    def __init__(self, line: HostLine, stripes: RankStripes, most: int) -> None:
        self._line = line
        self._stripes = stripes
        self._most = most
        self._stock: deque[int] = deque()
        self._wanted = FIRST_STOCK
        self._taking = 0
        self._writing: dict[str, _Writing] = {}
        self._pending: set[bytes] = set()
        self._publishing: set[int] = set()
        self._stored: list[bytes] = []

    def __len__(self) -> int:
        """Pages that are free to be written."""
        return len(self._stock)

    @property
    def pending(self) -> int:
        """Blocks that are being written or published."""
        return len(self._pending)

    def is_pending(self, key: bytes) -> bool:
        """Whether ``key`` is one of them."""
        return key in self._pending

    def is_current(self, owner: str) -> bool:
        """Whether the pages that ``owner`` writes are of the arena that there is now."""
        writing = self._writing.get(owner)
        return writing is not None and writing.life == self._line.life

    def forget(self) -> None:
        """The pages are of an arena that is gone.  Ops in flight write there all the same."""
        self._stock.clear()
        self._publishing.clear()
        self._taking = 0

    def still_ours(self, pages: Sequence[int]) -> None:
        """The connection is another one, and these are the pages that were not lost with the last one."""
        busy = {page for writing in self._writing.values() for page, _, _ in writing.blocks.values()}
        self._stock = deque(page for page in pages if page not in busy and page not in self._publishing)

    def drain(self) -> list[bytes]:
        """What was published since the last call."""
        stored, self._stored = self._stored, []
        return stored

    def reserve_many(
        self, owner: str, wanted: Sequence[tuple[bytes, int, int]], tier: Tier
    ) -> list[tuple[int, ...] | None]:
        """A page in stock for each (key, bytes, depth); ``None`` where the key is on its way or no page is left."""
        if tier is not Tier.DRAM or not self._line.usable:
            return [None] * len(wanted)
        writing = self._writing.setdefault(owner, _Writing(self._line.life))
        places: list[tuple[int, ...] | None] = []
        short = 0
        for key, nbytes, depth in wanted:
            if key in self._pending or not self._stock:
                short += key not in self._pending
                places.append(None)
                continue
            page = self._stock.popleft()
            writing.blocks[key] = page, nbytes, depth
            self._pending.add(key)
            places.append((page,))
        if not writing.blocks:
            del self._writing[owner]
        if short:
            self._wanted = min(self._most, max(2 * self._wanted, self._wanted + short))
        self.restock()
        return places

    def commit_many(self, owner: str, written: Mapping[bytes, bytes], tier: Tier) -> None:
        """Have what ``owner`` wrote published: for others one round trip later."""
        writing = self._writing.get(owner)
        if writing is None or not written:
            return
        objects = []
        for key, checksums in written.items():
            page, nbytes, depth = writing.blocks.pop(key)
            objects.append(NewObject(page, key, nbytes, depth, self._stripes.stored(checksums)))
        if writing.life == self._line.life:
            self._publishing.update(new.page for new in objects)
            self._line.say(PublishAll(writing.life, objects))
            return
        self._pending.difference_update(written)

    def abort_owner(self, owner: str) -> None:
        """What ``owner`` has not published is not wanted any more."""
        writing = self._writing.pop(owner, None)
        if writing is not None:
            self._pending.difference_update(writing.blocks)
            if writing.life == self._line.life:
                self._stock.extend(page for page, _, _ in writing.blocks.values())

    def restock(self) -> None:
        """Ask for pages when a quarter of the stock is used."""
        if not self._line.usable or self._line.arena is None:
            return
        wanted = min(self._wanted, self._most, max(1, self._line.arena.pages // STOCK_PART))
        missing = min(wanted - len(self._stock), 2 * wanted - len(self._stock) - len(self._pending))
        if missing >= max(1, wanted // 4) and not self._taking:
            self._taking = missing
            self._line.say(Take(missing))

    def taken(self, answer: Taken) -> None:
        """Pages were granted, perhaps fewer than asked for."""
        if answer.life == self._line.life:
            self._taking = 0
            self._stock.extend(answer.pages)
            if answer.pages:
                self.restock()

    def published(self, answer: Published) -> None:
        """Note what is the pool's now; pages that stayed ours go back into the stock."""
        stored: list[bytes] = []
        for new, status in zip(answer.objects, answer.statuses, strict=True):
            self._pending.discard(new.key)
            if answer.life == self._line.life:
                self._publishing.discard(new.page)
                if status is not None and status is not PutStatus.STORED:
                    self._stock.append(new.page)
            if status is PutStatus.STORED:
                stored.append(new.key)
            if status is not None and status.kept:
                self._line.known.add(new.key)
            elif status is not PutStatus.STORED:
                reason = "daemon_gone" if status in (None, PutStatus.TIMED_OUT) else "daemon_refused"
                self._line.stats.add("vllm:umbp_dropped_stores", 1, reason)
        if stored:
            self._stored += stored
