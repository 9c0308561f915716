"""What the daemon has lent to this engine: readable, pinned by who loads it, and given back by the last of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from umbp_connectors.daemon.messages import HELD, LENT
from umbp_core.directory import Copy
from umbp_core.errors import UnknownOwner
from umbp_core.ops import CHECKSUM_BYTES
from umbp_core.tiers import Tier, TierSet
from umbp_vllm.host_line import HostLine, RankStripes
from umbp_vllm.host_words import Borrow, GiveBack, Lent

FRESH_PART = 0.3
"""How much of a lease may pass before what was lent is begun to be loaded."""
NEVER = 0.0
"""A time that has always passed."""
LAST_PART = 0.8
"""How much of a lease may pass before a load that reads it does not count any more."""


@dataclass(eq=False, slots=True)
class Loan:
    """Objects that this engine may read.  It is given back when the last who holds it lets go."""

    life: int
    numbers: tuple[int, ...]
    copies: dict[bytes, Copy]
    fresh_until: float
    """Until when a load may begin."""
    until: float
    """Until when what was loaded counts."""
    holders: int = 0


class HostLoans:
    """All loans of one engine.  Scheduler thread only."""

    def __init__(self, line: HostLine, stripes: RankStripes) -> None:
        self._line = line
        self._stripes = stripes
        self._lent: dict[bytes, Loan] = {}
        self._fresh: deque[Loan] = deque()
        """Loans in the order in which they grow stale."""
        self._pins: dict[str, list[Loan]] = {}
        self._asked: dict[int, tuple[int, int]] = {}
        """How many loans what was asked for may become, and the line's epoch then, by the number of the question."""
        self._out = 0
        """Those, and the loans that are not given back."""
        self.given_back_at = NEVER
        """When this engine last had one loan less."""

    def __len__(self) -> int:
        """Objects that may be read."""
        return len(self._lent)

    @property
    def pinned(self) -> int:
        """Who has something pinned."""
        return len(self._pins)

    def forget(self) -> None:
        """Nothing is matched any more; who reads something may go on."""
        self._lent.clear()
        self._fresh.clear()

    def discard(self, key: bytes) -> bool:
        """``key`` is matched no more; whether it was on loan."""
        return self._lent.pop(key, None) is not None

    def has_room(self, keys: Sequence[bytes]) -> bool:
        """Whether the daemon lends ``keys`` too: it lends one client no more than so many times at once."""
        return not self._out or self._out + self._loans_for(keys) <= HELD

    def ask(self, number: int, keys: Sequence[bytes], until: float) -> None:
        """Ask for ``keys``.  The answer goes to :meth:`install`, or to :meth:`turn_down`."""
        loans = self._loans_for(keys)
        self._asked[number] = loans, self._line.epoch
        self._out += loans
        self._line.say(Borrow(number, keys, until))

    def _loans_for(self, keys: Sequence[bytes]) -> int:
        arena = self._line.arena
        return -(-len(keys) // arena.objects) if arena is not None else 1

    def turn_down(self, answer: Lent) -> None:
        """Nobody wants what was lent any more."""
        self._answered(answer)
        self._give_back(answer.life, answer.loans)

    def _answered(self, answer: Lent) -> bool:
        """Whether what was lent counts: the daemon may have been told to forget it since it was asked for."""
        loans, epoch = self._asked.pop(answer.number, (0, self._line.epoch))
        self._out += len(answer.loans) - loans
        return epoch == self._line.epoch

    def _give_back(self, life: int, loans: tuple[int, ...]) -> None:
        if loans:
            self._out -= len(loans)
            self.given_back_at = self._line.clock()
            self._line.say(GiveBack(life, loans))

    def install(self, answer: Lent) -> Loan:
        """What was lent, held by the caller, who has to :meth:`let_go` of it."""
        counts = self._answered(answer)
        arena = self._line.arena
        copies: dict[bytes, Copy] = {}
        if arena is not None and answer.life == self._line.life and counts:
            width = arena.stripes * CHECKSUM_BYTES
            for key, place in answer.places:
                if LENT[place.status].hit and len(place.checksum) == width:
                    checksums = self._stripes.expected(place.checksum)
                    copies[key] = Copy(Tier.DRAM, (place.page,), place.nbytes, checksums)
                    self._line.known.add(key)
                else:
                    self._line.known.discard(key)
        lease = arena.lease_s if arena is not None else 0.0
        fresh_until, until = answer.until - (1 - FRESH_PART) * lease, answer.until - (1 - LAST_PART) * lease
        loan = Loan(answer.life, answer.loans, copies, fresh_until, until, holders=1)
        self._lent.update(dict.fromkeys(copies, loan))
        self._fresh.append(loan)
        return loan

    def expire(self, now: float) -> None:
        """What was lent too long ago is matched no more; who holds it may go on."""
        while self._fresh and self._fresh[0].fresh_until <= now:
            self._unlist(self._fresh.popleft())

    def _unlist(self, loan: Loan) -> None:
        for key in loan.copies:
            if self._lent.get(key) is loan:
                del self._lent[key]

    def is_fresh(self, loan: Loan) -> bool:
        """Whether a load from ``loan`` may still begin."""
        return loan.life == self._line.life and self._line.clock() < loan.fresh_until and not self._line.clearing

    def let_go(self, loan: Loan) -> None:
        """One holder less."""
        loan.holders -= 1
        if not loan.holders:
            self._unlist(loan)
            self._give_back(loan.life, loan.numbers)

    def stale(self, owner: str) -> bool:
        """Whether something that ``owner`` has pinned was lent too long ago to begin a load."""
        return any(not self.is_fresh(loan) for loan in self._pins.get(owner, ()))

    def until(self, owner: str) -> float:
        """Until when what ``owner`` loads counts: the time of ``time.monotonic`` of this host."""
        loans = self._pins.get(owner, ())
        if any(loan.life != self._line.life for loan in loans):
            return NEVER
        return min([loan.until for loan in loans], default=NEVER)

    def tiers_of(self, key: bytes) -> int:
        """Where ``key`` can be read by this engine now, as a mask."""
        return TierSet.of(Tier.DRAM) if key in self._lent else 0

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on and without a gap, are on loan."""
        lent = self._lent
        for index, key in enumerate(keys):
            if key not in lent:
                return index
        return len(keys)

    def contains_many(self, keys: Iterable[bytes]) -> list[bool]:
        """For each of ``keys`` whether it is on loan."""
        return [key in self._lent for key in keys]

    def copy(self, key: bytes, tier: Tier) -> Copy | None:
        """The copy of ``key`` that is on loan."""
        loan = self._lent.get(key)
        return loan.copies[key] if loan is not None and tier is Tier.DRAM else None

    def keys(self, tier: Tier) -> list[bytes]:
        """What is on loan."""
        return list(self._lent) if tier is Tier.DRAM else []

    def pin(self, owner: str, keys: Iterable[bytes], tier: Tier | None = None) -> list[Copy]:
        """Keep what is lent of ``keys`` until :meth:`unpin`.  Raises ``UnknownOwner`` when something is not on loan."""
        copies, loans = [], dict[int, Loan]()
        for key in keys:
            loan = self._lent.get(key)
            if loan is None:
                raise UnknownOwner(f"object {key.hex()} is not on loan (any more), {owner} cannot pin it; ask again")
            loans[id(loan)] = loan
            copies.append(loan.copies[key])
        for loan in loans.values():
            loan.holders += 1
        self._pins.setdefault(owner, []).extend(loans.values())
        return copies

    def unpin(self, owner: str) -> None:
        """End all pins of ``owner``."""
        for loan in self._pins.pop(owner, ()):
            self.let_go(loan)
