"""The leader's directory where the host's daemon has the real one: what this engine has on loan, and pages for stores.

Loads and stores ask it what they ask a :class:`~umbp_core.directory.Directory`, and get answers about what this engine
may read or write right now.  A request's blocks come on loan before it is matched (:mod:`umbp_vllm.enquiries`); pages
for stores are granted in advance, without keys.  What is said to the daemon and what it answers goes through
:class:`~umbp_vllm.host_talk.Talker`, so that no call here waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from umbp_connectors.daemon.follower import PoolFollower
from umbp_core.copies import TierStats
from umbp_core.directory import Change, EventKind
from umbp_core.ops import Direction
from umbp_core.tiers import Tier
from umbp_vllm.host_line import HostLine, RankStripes
from umbp_vllm.host_loans import NEVER, HostLoans
from umbp_vllm.host_stock import HostStock
from umbp_vllm.host_words import Attached, Cleared, Doubt, Gone, Lent, Published, Taken, There
from umbp_vllm.metadata import StepMetadata, WorkerReport

CLOSE_S = 3.0
"""How long the end of an engine may wait until what it stored last is published."""


class HostPool:
    """See above.  Scheduler thread only; nothing here waits or raises because of the daemon.

    ``most_stock`` bounds the pages that are granted in advance.  ``follower`` tells others what the daemon holds.
    """

    def __init__(
        self, line: HostLine, stripes: RankStripes, most_stock: int, follower: PoolFollower | None = None
    ) -> None:
        self.line = line
        self._follower = follower
        self.loans = HostLoans(line, stripes)
        self.stock = HostStock(line, stripes, most_stock)
        self.on_answer: Callable[[There | Lent], None] = _nobody
        """Who takes the answers to questions."""
        self._closed = False
        loans, stock = self.loans, self.stock
        self.tiers_of, self.copy, self.keys = loans.tiers_of, loans.copy, loans.keys
        self.count_prefix, self.contains_many = loans.count_prefix, loans.contains_many
        self.pin, self.unpin = loans.pin, loans.unpin
        self.reserve_many, self.commit_many = stock.reserve_many, stock.commit_many
        self.abort_owner = stock.abort_owner

    def open(self) -> None:
        """Start talking, and following."""
        self.line.open()
        if self._follower is not None:
            self._follower.open()

    def close(self, timeout: float = CLOSE_S) -> None:
        """Publish what is written, and leave; bounded in time.  Idempotent."""
        if not self._closed:
            self._closed = True
            if self._follower is not None:
                self._follower.close()
            self.line.close(timeout)

    def stamp(self, metadata: StepMetadata) -> None:
        """Say which arena the step's ops mean, and until when what its loads bring counts."""
        metadata.arena = self.line.arena.name if self.line.arena is not None else b""
        for op in metadata.ops:
            if op.direction is Direction.LOAD:
                metadata.until[op.op_id] = self.loans.until(op.op_id)
            elif not self.stock.is_current(op.op_id):  # planned before the arena changed, and not sent yet
                metadata.until[op.op_id] = NEVER

    def follow(self, report: WorkerReport) -> None:
        """Take what the ranks say about their mappings."""
        for rank, name in report.arenas.items():
            self.line.mapped(rank, name)
        if report.arenas:
            self.stock.restock()

    def take_answers(self) -> None:
        """Take what the daemon has answered since the last call."""
        while True:
            answer = self.line.take()
            if answer is None:
                return
            _TAKERS[type(answer)](self, answer)

    def _attached(self, answer: Attached) -> None:
        if self.line.attached(answer):
            self.loans.forget()
            self.stock.forget()
        else:
            self.stock.still_ours(answer.arena.taken)
        self.stock.restock()

    def _gone(self, answer: Gone) -> None:
        self.line.gone(answer)

    def _cleared(self, answer: Cleared) -> None:
        self.line.cleared()
        self.stock.restock()

    def _answered(self, answer: There | Lent) -> None:
        self.on_answer(answer)

    def _taken(self, answer: Taken) -> None:
        self.stock.taken(answer)

    def _published(self, answer: Published) -> None:
        self.stock.published(answer)

    # ---- as a directory ------------------------------------------------------------------------------

    @property
    def knows_priorities(self) -> bool:
        """False: who is evicted first is the daemon's to say."""
        return False

    def prioritise(self, priorities: Mapping[bytes, int], tier: Tier) -> None:
        """Nothing: see :attr:`knows_priorities`."""

    def is_present_or_pending(self, key: bytes, tier: Tier) -> bool:
        """Whether ``key`` is believed to be in the pool, or on its way."""
        return self.stock.is_pending(key) or key in self.line.known

    def stats(self, tier: Tier) -> TierStats:
        """Of this engine alone: objects on loan, pages that it writes, and pages in stock."""
        loans, stock = self.loans, self.stock
        total = len(loans) + len(stock) + stock.pending
        return TierStats(total, len(stock), len(loans), loans.pinned, stock.pending)

    def drain_changes(self) -> list[Change]:
        """What this engine has published since the last call.  What the daemon evicts is not said."""
        self.take_answers()
        stored = self.stock.drain()
        return [Change(EventKind.ADDED, Tier.DRAM, stored, ())] if stored else []

    def touch(self, keys: Sequence[bytes]) -> None:
        """Nothing: what is borrowed counts as used, with the daemon."""

    def reserve(self, owner: str, key: bytes, tier: Tier, nbytes: int, depth: int = 0) -> tuple[int, ...] | None:
        """As :meth:`reserve_many` for one."""
        return self.reserve_many(owner, [(key, nbytes, depth)], tier)[0]

    def drop(self, key: bytes, tier: Tier) -> bool:
        """Have the daemon look at ``key``, whose bytes are bad."""
        self.line.known.discard(key)
        self.line.say(Doubt([key]))
        return self.loans.discard(key)

    def clear(self, tier: Tier) -> int:
        """Have the daemon forget every object of this model; nothing is read or written before it has."""
        count = len(self.loans)
        self.loans.forget()
        self.line.clear()
        return count


class StoreView:
    """The pool as stores see it: what it is believed to hold counts, not only what is on loan."""

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool
        self.tiers_of = pool.tiers_of
        self.copy = pool.copy
        self.prioritise = pool.prioritise
        self.is_present_or_pending = pool.is_present_or_pending
        self.reserve_many = pool.reserve_many
        self.commit_many = pool.commit_many
        self.abort_owner = pool.abort_owner

    @property
    def knows_priorities(self) -> bool:
        """As the pool's."""
        return self._pool.knows_priorities

    def contains_many(self, keys: Iterable[bytes]) -> list[bool]:
        """For each of ``keys`` whether it is believed to be in the pool, or on its way."""
        there = self._pool.is_present_or_pending
        return [there(key, Tier.DRAM) for key in keys]


def _nobody(answer: There | Lent) -> None:
    """Takes nothing."""


_TAKERS: Mapping[type[Any], Callable[[HostPool, Any], None]] = {
    Attached: HostPool._attached,
    Gone: HostPool._gone,
    There: HostPool._answered,
    Lent: HostPool._answered,
    Taken: HostPool._taken,
    Published: HostPool._published,
    Cleared: HostPool._cleared,
}
