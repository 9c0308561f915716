"""Plain models of pages, leases, eviction and the directory.

They promise the same as the real parts, with lists and loops instead of indexes and counters.  A model never
chooses pages: it says what an allocation must look like, and is told which pages it became.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from umbp_core.directory import EventKind, TierStats
from umbp_core.eviction import EvictionPolicy
from umbp_core.grouping import BlockOf
from umbp_core.tiers import Tier, TierSet

PENDING = "pending"
PUBLISHED = "published"
RETIRED = "retired"
"""States of a model's copy; a retired one is not readable any more but still pinned."""

RUN = "run"
ONE_BUFFER = "one buffer"
SCATTERED = "scattered"
"""Shapes of an allocation, the preferred one first."""


class PageModel:
    """Which pages of which buffers are used, as a set."""

    def __init__(self, page_bytes: int, buffer_bytes: Sequence[int]) -> None:
        self.page_bytes = page_bytes
        self.buffers: list[range] = []
        start = 0
        for size in buffer_bytes:
            self.buffers.append(range(start, start + size // page_bytes))
            start = self.buffers[-1].stop
        self.total = start
        self.used: set[int] = set()

    def pages_for(self, nbytes: int) -> int:
        """Pages of an object, counted one by one."""
        return len(range(0, nbytes, self.page_bytes))

    def expected_shape(self, count: int) -> str | None:
        """The shape that an allocation of ``count`` pages must have now; ``None`` when it must fail."""
        free = [[page not in self.used for page in buffer] for buffer in self.buffers]
        for flags in free:
            if any(all(flags[start : start + count]) for start in range(len(flags) - count + 1)):
                return RUN
        if any(sum(flags) >= count for flags in free):
            return ONE_BUFFER
        return SCATTERED if sum(map(sum, free)) >= count else None

    def shape_of(self, pages: Sequence[int]) -> str:
        """The best shape that ``pages`` can be said to have."""
        if not any(all(page in buffer for page in pages) for buffer in self.buffers):
            return SCATTERED
        contiguous = list(pages) == list(range(pages[0], pages[0] + len(pages)))
        return RUN if contiguous else ONE_BUFFER

    def can_claim(self, pages: Sequence[int]) -> bool:
        """Whether all of ``pages`` exist, are free and are named once."""
        return all(page in range(self.total) and page not in self.used for page in pages) and len(set(pages)) == len(
            pages
        )

    def free(self, pages: Iterable[int]) -> int:
        """Free what is used of ``pages``; how many that were."""
        before = len(self.used)
        self.used -= set(pages)
        return before - len(self.used)


class LeaseModel:
    """Owner -> deadline and keys."""

    def __init__(self) -> None:
        self.deadlines: dict[str, float] = {}
        self.keys: dict[str, list[bytes]] = {}

    def is_leased(self, key: bytes) -> bool:
        """Whether any owner's list has ``key``."""
        return any(key in keys for keys in self.keys.values())

    def grant(self, owner: str, keys: Iterable[bytes], deadline: float) -> None:
        """Add ``keys`` to the owner's list; the later deadline counts."""
        self.deadlines[owner] = max(deadline, self.deadlines.get(owner, deadline))
        self.keys[owner] = list(dict.fromkeys([*self.keys.get(owner, []), *keys]))

    def renew(self, owner: str, deadline: float) -> bool:
        """Whether the owner had a lease to extend."""
        if owner not in self.deadlines:
            return False
        self.deadlines[owner] = max(deadline, self.deadlines[owner])
        return True

    def release(self, owner: str) -> tuple[bytes, ...]:
        """Forget the owner; its keys."""
        self.deadlines.pop(owner, None)
        return tuple(self.keys.pop(owner, []))

    def expire(self, now: float) -> list[str]:
        """Forget all owners that are due; them by deadline, then name."""
        due = sorted((deadline, owner) for owner, deadline in self.deadlines.items() if deadline <= now)
        for _, owner in due:
            self.release(owner)
        return [owner for _, owner in due]


class LruModel:
    """Keys in a list, the oldest first."""

    def __init__(self) -> None:
        self.order: list[bytes] = []
        self.depths: dict[bytes, int] = {}

    def added(self, key: bytes, depth: int) -> None:
        """Append the key."""
        self.removed(key)
        self.order.append(key)
        self.depths[key] = depth

    def touched(self, key: bytes) -> None:
        """Move a known key to the end."""
        if key in self.order:
            self.order.remove(key)
            self.order.append(key)

    def removed(self, key: bytes) -> None:
        """Take the key out."""
        if key in self.order:
            self.order.remove(key)
            del self.depths[key]

    def victims(self) -> Iterator[bytes]:
        """The list as it is."""
        return iter(list(self.order))


class PrefixAwareLruModel(LruModel):
    """Picks from the list's first ``window`` keys, again and again."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def victims(self) -> Iterator[bytes]:
        """Of the first ``window`` keys left, the first of the deepest."""
        left = list(self.order)
        picked = []
        while left:
            picked.append(max(left[: self.window], key=lambda key: self.depths[key]))
            left.remove(picked[-1])
        return iter(picked)


@dataclass(eq=False, slots=True)
class ModelCopy:
    """A copy that holds pages, whatever its state."""

    key: bytes
    tier: Tier
    pages: tuple[int, ...]
    nbytes: int
    depth: int
    state: str
    owner: str = ""
    checksum: bytes = b""
    pinned_by: list[str] = field(default_factory=list)


class DirectoryModel:
    """One flat list of copies; every answer is a search through it."""

    def __init__(
        self,
        page_bytes: int,
        tier_bytes: dict[Tier, Sequence[int]],
        new_policy: Callable[[], EvictionPolicy],
        block_of: BlockOf | None = None,
    ) -> None:
        self.block_of = block_of
        self.page_bytes = page_bytes
        self.total = {tier: sum(size // page_bytes for size in sizes) for tier, sizes in tier_bytes.items()}
        self.policies = {tier: new_policy() for tier in tier_bytes}
        self.copies: list[ModelCopy] = []
        self.leases = LeaseModel()
        self.events: list[tuple[EventKind, ModelCopy]] = []

    def find(self, key: bytes, tier: Tier, *states: str) -> ModelCopy | None:
        """The copy of ``key`` in ``tier`` that is in one of ``states``."""
        found = [copy for copy in self.copies if (copy.key, copy.tier) == (key, tier) and copy.state in states]
        return found[0] if found else None

    def in_state(self, state: str, tier: Tier | None = None) -> list[ModelCopy]:
        """All copies in ``state``, of one tier or all."""
        return [copy for copy in self.copies if copy.state == state and tier in {None, copy.tier}]

    def tiers_of(self, key: bytes) -> int:
        """Mask of the tiers where ``key`` is readable."""
        return TierSet.of(*(copy.tier for copy in self.in_state(PUBLISHED) if copy.key == key))

    def used_pages(self, tier: Tier) -> list[int]:
        """Pages of all copies in ``tier``, with duplicates if there were any."""
        return [page for copy in self.copies if copy.tier is tier for page in copy.pages]

    def stats(self, tier: Tier) -> TierStats:
        """Counted anew."""
        return TierStats(
            total_pages=self.total[tier],
            free_pages=self.total[tier] - len(self.used_pages(tier)),
            objects=len(self.in_state(PUBLISHED, tier)),
            pinned=sum(copy.tier is tier and bool(copy.pinned_by) for copy in self.copies),
            reserved=len(self.in_state(PENDING, tier)),
            nbytes=sum(copy.nbytes for copy in self.in_state(PUBLISHED, tier)),
        )

    def fits(self, tier: Tier, nbytes: int) -> bool:
        """Whether the whole tier could hold the object."""
        return nbytes <= self.page_bytes * self.total[tier]

    def make_room(self, tier: Tier, nbytes: int) -> bool:
        """Evict as ``reserve`` must; ``False``, with nothing evicted, when that makes no room."""
        need = len(range(0, nbytes, self.page_bytes))
        free = self.stats(tier).free_pages
        evictable = [copy for copy in self.in_state(PUBLISHED, tier) if not copy.pinned_by]
        if free >= need:
            return True
        if free + sum(len(copy.pages) for copy in evictable) < need:
            return False
        victims: list[ModelCopy] = []
        passed: list[ModelCopy] = []

        def enough() -> bool:
            return free + sum(len(copy.pages) for copy in victims) >= need

        for key in self.policies[tier].victims():
            parts = self._parts(tier, key)
            if enough() or parts[0] in victims + passed:
                continue
            whole = not any(map(self._is_held, parts))
            (victims if whole else passed).extend(parts)
        for copy in list(passed):
            if not enough() and not self._is_held(copy):
                victims.append(copy)
                passed.remove(copy)
        for copy in passed:
            self.policies[tier].touched(copy.key)
        if free + sum(len(copy.pages) for copy in victims) < need:
            return False
        for copy in victims:
            self.unpublish(copy)
        return True

    def trim(self, tier: Tier, pages: int, most: int, keep: Sequence[bytes]) -> int:
        """Evict as ``trim`` must; how many objects went."""
        victims: list[ModelCopy] = []
        passed: list[ModelCopy] = []
        for key in self.policies[tier].victims():
            if sum(len(copy.pages) for copy in victims) >= pages or len(victims + passed) >= most:
                break
            parts = self._parts(tier, key)
            if parts[0] not in victims + passed:
                held = any(self._is_held(copy) or copy.key in keep for copy in parts)
                (passed if held else victims).extend(parts)
        for copy in passed:
            self.policies[tier].touched(copy.key)
        for copy in victims:
            self.unpublish(copy)
        return len(victims)

    def _parts(self, tier: Tier, key: bytes) -> list[ModelCopy]:
        """The copies in ``tier`` of the block that ``key`` is a part of."""
        block = self.block_of(key) if self.block_of else None
        return [
            copy
            for copy in self.in_state(PUBLISHED, tier)
            if copy.key == key or (self.block_of is not None and block is not None and self.block_of(copy.key) == block)
        ]

    def _is_held(self, copy: ModelCopy) -> bool:
        return bool(copy.pinned_by) or self.leases.is_leased(copy.key)

    def add(self, copy: ModelCopy) -> None:
        """Take ``copy`` into the list; announces it when it is published."""
        self.copies.append(copy)
        if copy.state == PUBLISHED:
            self._announce(copy)

    def publish(self, copy: ModelCopy, checksum: bytes) -> None:
        """Make a pending copy readable, the newest in the list."""
        self.copies.remove(copy)
        self.copies.append(copy)
        copy.state = PUBLISHED
        copy.checksum = checksum
        self._announce(copy)

    def _announce(self, copy: ModelCopy) -> None:
        self.policies[copy.tier].added(copy.key, copy.depth)
        self.events.append((EventKind.ADDED, copy))

    def unpublish(self, copy: ModelCopy) -> None:
        """Make a published copy unreadable; it stays in the list while it is pinned."""
        self.policies[copy.tier].removed(copy.key)
        self.events.append((EventKind.REMOVED, copy))
        copy.state = RETIRED
        self._forget_unused()

    def clear(self, tier: Tier) -> int:
        """Unpublish what is not leased; how many that were."""
        going = [copy for copy in self.in_state(PUBLISHED, tier) if not self.leases.is_leased(copy.key)]
        for copy in going:
            self.unpublish(copy)
        return len(going)

    def abort(self, copies: Iterable[ModelCopy]) -> None:
        """Take pending copies out of the list."""
        for copy in copies:
            self.copies.remove(copy)

    def unpin(self, owner: str) -> None:
        """Take the owner out of every copy's pins."""
        for copy in self.copies:
            copy.pinned_by = [name for name in copy.pinned_by if name != owner]
        self._forget_unused()

    def _forget_unused(self) -> None:
        self.copies = [copy for copy in self.copies if copy.state != RETIRED or copy.pinned_by]
