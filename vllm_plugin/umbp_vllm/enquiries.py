"""What a request asks the daemon before it is matched: what is there, and then the loan of what it needs.

The first question goes out when the request arrives, the second when the engine first asks for it, because only then
it is known what the engine has itself.  Until the answer is there, the request is told "not yet"; so it is while the
daemon would lend it nothing because other requests hold too many loans.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from umbp_core.ports import Clock
from umbp_vllm.groups import KvGroup
from umbp_vllm.host_loans import Loan
from umbp_vllm.host_pool import HostPool
from umbp_vllm.host_words import Lent, LookUp, There
from umbp_vllm.stats import UmbpStats

if TYPE_CHECKING:
    from umbp_vllm.matching import Matcher
    from umbp_vllm.requests import RequestState

MOST_OPEN = 4096
"""Questions without an answer; a request beyond that is a miss."""
_EARLY_S = 10.0
"""How long a question of a request that nobody schedules is worth asking."""


class Stage(enum.Enum):
    """How far an enquiry is."""

    LOOKING = enum.auto()
    """It was asked what is there."""
    FOUND = enum.auto()
    """That is known."""
    WANTING = enum.auto()
    """So is what of it is needed; it is asked for when there is room for one more loan."""
    BORROWING = enum.auto()
    """What is needed was asked for."""
    HELD = enum.auto()
    """It is on loan."""
    OVER = enum.auto()
    """The request has had its answer."""


@dataclass(slots=True)
class Enquiry:
    """One request's questions.  ``start`` is what the engine had itself; ``since`` when it first had to wait."""

    number: int
    stage: Stage = Stage.LOOKING
    found: AbstractSet[bytes] = frozenset()
    needed: Sequence[bytes] = ()
    start: int = -1
    since: float | None = None
    epoch: int = 0
    loan: Loan | None = None
    asked: tuple[tuple[Sequence[bytes], bool], ...] = field(default=())


class Among:
    """A set of keys as what the matcher asks."""

    def __init__(self, keys: AbstractSet[bytes]) -> None:
        self._keys = keys

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys`` are in the set, from the first on and without a gap."""
        return next((index for index, key in enumerate(keys) if key not in self._keys), len(keys))

    def contains_many(self, keys: Iterable[bytes]) -> list[bool]:
        """For each of ``keys`` whether it is in the set."""
        return [key in self._keys for key in keys]


class Enquirer:
    """Asks for all requests.  Scheduler thread only; never waits."""

    def __init__(
        self,
        pool: HostPool,
        matcher: Matcher,
        groups: Sequence[KvGroup],
        least_tokens: int,
        timeout_s: float,
        clock: Clock,
        stats: UmbpStats,
    ) -> None:
        """``least_tokens`` are worth a load; ``timeout_s`` bounds how long a request waits for each question."""
        self._pool = pool
        self._matcher = matcher
        self._groups = groups
        self._least_tokens = least_tokens
        self._timeout_s = timeout_s
        self._clock = clock
        self._stats = stats
        self._open: dict[int, Enquiry] = {}
        self._numbers = 0
        pool.on_answer = self._take

    def arrived(self, state: RequestState) -> None:
        """A request came: ask what is there of it."""
        if state.enquiry is None:
            self._look(state, self._clock() + _EARLY_S)

    def ready(self, state: RequestState, start: int, now: float) -> bool:
        """Whether everything is on loan that a load beyond ``start`` tokens can bring, or nothing will be."""
        pool = self._pool
        pool.take_answers()
        pool.loans.expire(now)
        enquiry = state.enquiry
        if enquiry is not None and enquiry.epoch != pool.line.epoch:
            self.forget(state)
            enquiry = None
        if enquiry is None:
            enquiry = self._look(state, now + self._timeout_s)
        if enquiry.since is None:
            enquiry.since = now
        if enquiry.start != start:
            self._starts_at(enquiry, start, now)
        if enquiry.stage is Stage.HELD and enquiry.loan is not None and not pool.loans.is_fresh(enquiry.loan):
            self._end_loan(enquiry)
            enquiry.stage, enquiry.since = Stage.FOUND, now
        if enquiry.stage is Stage.FOUND:
            self._decide(state, enquiry, now)
        if enquiry.stage is Stage.WANTING:
            self._borrow(enquiry, now)
        if enquiry.stage in (Stage.HELD, Stage.OVER):
            return True
        if self._waits(enquiry, now):
            return False
        if pool.line.usable:
            late = "too_many_loans" if enquiry.stage is Stage.WANTING else "daemon_late"
            self._stats.add("vllm:umbp_degraded", 1, late)
        self._over(enquiry)
        return True

    def _waits(self, enquiry: Enquiry, now: float) -> bool:
        """Whether it is worth waiting: for an answer, or for loans, which others give back all the time."""
        line, since = self._pool.line, now if enquiry.since is None else enquiry.since
        if enquiry.stage is Stage.WANTING:
            since = max(since, self._pool.loans.given_back_at)
        return now - since < self._timeout_s and (line.usable or line.starting)

    def settled(self, state: RequestState) -> None:
        """The request has its answer: what it needs is pinned."""
        if state.enquiry is not None:
            self._over(state.enquiry)

    def reopen(self, state: RequestState) -> None:
        """What the request was promised is given up; it may ask for it again."""
        enquiry = state.enquiry
        if enquiry is not None and enquiry.stage is Stage.OVER:
            enquiry.stage, enquiry.since = Stage.FOUND, None

    def forget(self, state: RequestState) -> None:
        """The request is gone, or everything about it is decided anew."""
        enquiry, state.enquiry = state.enquiry, None
        if enquiry is not None:
            self._over(enquiry)

    def is_stale(self, op_id: str) -> bool:
        """Whether what the staged match ``op_id`` needs was lent too long ago."""
        return self._pool.loans.stale(op_id)

    def _look(self, state: RequestState, until: float) -> Enquiry:
        enquiry = state.enquiry = Enquiry(self._number(), epoch=self._pool.line.epoch)
        runs = []
        for group in self._groups:
            keys = tuple(state.keys.of(group))
            if keys:
                runs.append((keys, group.reach is None and group.chunk is None))
        enquiry.asked = tuple(runs)
        if not runs or len(self._open) >= MOST_OPEN:
            enquiry.stage = Stage.OVER
            return enquiry
        self._open[enquiry.number] = enquiry
        self._pool.line.say(LookUp(enquiry.number, enquiry.asked, until))
        return enquiry

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _starts_at(self, enquiry: Enquiry, start: int, now: float) -> None:
        """The engine has another number of tokens itself than when it asked before."""
        enquiry.start = start
        if enquiry.stage in (Stage.LOOKING, Stage.FOUND):
            return
        self._over(enquiry)
        enquiry.stage, enquiry.since = Stage.FOUND, now

    def _decide(self, state: RequestState, enquiry: Enquiry, now: float) -> None:
        """Find out what is needed of what was found, if anything."""
        if not self._pool.line.usable:
            self._over(enquiry)
            return
        start, matcher = enquiry.start, self._matcher
        limit = matcher.most(state.request.num_tokens)
        end = matcher.longest(state.keys, start, limit, Among(enquiry.found))
        enquiry.needed = matcher.keys_needed(state.keys, start, end) if end - start >= self._least_tokens else []
        if enquiry.needed:
            enquiry.stage, enquiry.since = Stage.WANTING, now
        else:
            self._over(enquiry)

    def _borrow(self, enquiry: Enquiry, now: float) -> None:
        """Ask for what is needed, if there is room for it."""
        loans = self._pool.loans
        if not self._pool.line.usable or len(self._open) >= MOST_OPEN:
            self._over(enquiry)
        elif loans.has_room(enquiry.needed):
            enquiry.number, enquiry.stage, enquiry.since = self._number(), Stage.BORROWING, now
            self._open[enquiry.number] = enquiry
            loans.ask(enquiry.number, enquiry.needed, now + self._timeout_s)

    def _take(self, answer: There | Lent) -> None:
        """Take an answer; a loan that nobody waits for any more goes back at once."""
        enquiry = self._open.pop(answer.number, None)
        if isinstance(answer, There):
            if enquiry is not None:
                self._there(enquiry, answer)
            return
        if enquiry is None:
            self._pool.loans.turn_down(answer)
            return
        enquiry.loan, enquiry.stage = self._pool.loans.install(answer), Stage.HELD

    def _there(self, enquiry: Enquiry, answer: There) -> None:
        enquiry.found, enquiry.stage = answer.keys, Stage.FOUND
        if answer.asked:
            known, there = self._pool.line.known, answer.keys
            for keys, _ in enquiry.asked:
                for key in keys:
                    if key in there:
                        known.add(key)
                    else:
                        known.discard(key)
        enquiry.asked = ()

    def _over(self, enquiry: Enquiry) -> None:
        self._open.pop(enquiry.number, None)
        self._end_loan(enquiry)
        enquiry.stage = Stage.OVER

    def _end_loan(self, enquiry: Enquiry) -> None:
        loan, enquiry.loan = enquiry.loan, None
        if loan is not None:
            self._pool.loans.let_go(loan)
