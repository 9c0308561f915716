"""What a client of the daemon holds of a pool: loans, grants, and pages without keys."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from umbp_connectors.daemon.messages import HELD
from umbp_connectors.pool.books import Filled
from umbp_connectors.pool.granting import Grant, PageStock
from umbp_connectors.pool.lending import Loan
from umbp_connectors.pool.outcomes import PutStatus
from umbp_core.errors import StateError
from umbp_core.wire.codes import ErrorCode, WireError


@dataclass(frozen=True, slots=True)
class _HeldLoan:
    loan: Loan
    pages: int
    until: float


@dataclass(frozen=True, slots=True)
class HeldGrant:
    """A grant, and the keys that it is for."""

    grant: Grant
    keys: Sequence[bytes]


class ClientHoldings:
    """What one connection holds, or one engine over several connections of which one at a time may change it.

    Every call of a connection carries the turn that it entered with; when a later one has entered, nobody listens to
    its answers, and it changes nothing any more.  Any thread.
    """

    def __init__(self, stock: PageStock) -> None:
        self._stock = stock
        self._lock = threading.Lock()
        self._turn = 0
        self._loans: dict[int, _HeldLoan] = {}
        self._grants: dict[int, HeldGrant] = {}
        self._ended = False

    @property
    def is_busy(self) -> bool:
        """Whether something is lent or granted that is about to be read or published."""
        return bool(self._loans or self._grants)

    def enter(self, turn: int) -> bool:
        """Whether the connection with this turn speaks for it from now on: there was no later one."""
        with self._lock:
            later, self._turn = turn > self._turn, max(turn, self._turn)
            return later

    def has_room(self, number: int) -> bool:
        """Whether a loan or grant of this number may be held too.  Raises ``WireError`` when one is held already."""
        with self._lock:
            if number in self._loans or number in self._grants:
                raise WireError(ErrorCode.INVALID_REQUEST, f"loan or grant {number} is held already")
            return len(self._loans) + len(self._grants) < HELD

    def add_loan(self, turn: int, number: int, loan: Loan, until: float) -> int:
        """Hold ``loan`` until then, unless nothing is lent; returns how many pages that are."""
        pages = sum(lent.status.hit for lent in loan.objects)
        with self._lock:
            if not pages or not self._is_current(turn):
                loan.release()
                return 0
            self._loans[number] = _HeldLoan(loan, pages, until)
        return pages

    def add_grant(self, turn: int, number: int, held: HeldGrant) -> int:
        """Hold a grant, unless nothing is granted; returns how many pages that are."""
        with self._lock:
            if not held.grant.pages or not self._is_current(turn):
                held.grant.discard()
                return 0
            self._grants[number] = held
        return held.grant.pages

    def pop_grant(self, number: int) -> HeldGrant | None:
        """A grant, which its publisher has to end."""
        with self._lock:
            return self._grants.pop(number, None)

    def end(self, number: int) -> int:
        """End a loan or a grant, if there is one of this number; returns how many pages are not held any more."""
        with self._lock:
            loan, grant = self._loans.pop(number, None), self._grants.pop(number, None)
        pages = 0
        if loan is not None:
            loan.loan.release()
            pages += loan.pages
        if grant is not None:
            grant.grant.discard()
            pages += grant.grant.pages
        return pages

    def next_lease(self) -> float | None:
        """When the next loan ends by itself, in monotonic seconds."""
        with self._lock:
            return min((held.until for held in self._loans.values()), default=None)

    def end_late(self) -> tuple[int, int]:
        """End the loans whose time is over; how many these are, and of how many pages."""
        now = time.monotonic()
        with self._lock:
            late = [number for number, held in self._loans.items() if held.until <= now]
        return len(late), sum(self.end(number) for number in late)

    def take(self, turn: int, count: int) -> list[int]:
        """Up to ``count`` more pages without keys."""
        with self._lock:
            return self._stock.take(count) if self._is_current(turn) else []

    def keep(self, turn: int, pages: Sequence[int]) -> tuple[list[int], int]:
        """Give all pages without keys back but these; returns those that are held then, and how many went."""
        with self._lock:
            if not self._is_current(turn):
                return [], 0
            held = self._stock.pages
            going = held.difference(pages)
            self._stock.give_back(going)
            return sorted(held - going), len(going)

    def give_back(self, turn: int, pages: Sequence[int]) -> int:
        """Give these pages without keys back; returns how many.  Raises ``WireError`` for one that is not held."""
        with self._lock:
            if not self._is_current(turn):
                return 0
            try:
                self._stock.give_back(pages)
            except StateError as error:
                raise WireError(ErrorCode.INVALID_REQUEST, str(error)) from None
            return len(set(pages))

    def publish(self, turn: int, filled: Sequence[Filled]) -> list[PutStatus]:
        """Publish what was written to pages without keys.  Raises ``WireError`` for a page that is not held."""
        with self._lock:
            if not self._is_current(turn):
                return [PutStatus.NO_ROOM] * len(filled)
            try:
                return self._stock.publish(filled)
            except StateError as error:
                raise WireError(ErrorCode.INVALID_REQUEST, str(error)) from None

    def close(self) -> int:
        """End everything; idempotent.  Returns how many pages are not held any more."""
        with self._lock:
            self._ended = True
            numbers = [*self._loans, *self._grants]
        return sum(self.end(number) for number in numbers) + self._stock.close()

    def _is_current(self, turn: int) -> bool:
        return turn == self._turn and not self._ended
