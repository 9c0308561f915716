"""Batches of objects between a caller's buffers and the daemon's memory, over one connection."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from umbp_connectors.daemon import messages
from umbp_connectors.daemon.link import Link
from umbp_connectors.daemon.messages import Place
from umbp_connectors.pool.copies import copy_in, copy_out
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_connectors.pool.put_batch import PutBatch
from umbp_connectors.pool.rows import RowViews, Views, sizes_of
from umbp_connectors.pool.shares import CopyShares

Answer = TypeVar("Answer")
Status = TypeVar("Status", GetStatus, PutStatus)

_PART_BYTES = 32 << 20
"""Bytes per loan or grant, at most: copying them takes many times as long as asking."""
_PART_OBJECTS = 32
"""Objects per loan or grant, at least, where more than one is needed: to ask for fewer costs as much."""
_PART_OF_ROWS_BYTES = 8 << 20
"""The same of objects that several threads copy together: that takes less time than to ask for them, if it is less."""
_SMALL_START = 8
"""A put that is one grant begins with this part of it.  Several are under way at once as it is."""
_LEAST_START = 8
"""Objects, at least: for fewer it costs as much to ask as to wait."""
_AHEAD = 2
"""Loans or grants that are asked for at a time: for the part that is copied next, and for the one after it."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written under one grant and is not published yet: the checksums, empty where nothing was."""

    number: int
    checksums: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class _Part:
    """``count`` objects of a batch, which are asked for together as loan or grant ``number``, and when that was.

    ``ahead``: an earlier part was out then.
    """

    start: int
    count: int
    number: int
    asked: float
    ahead: bool

    def nothing(self, status: Status) -> list[Status]:
        """What an empty answer means: ``status`` for all, or nothing yet when the earlier part may be the reason."""
        return [] if self.ahead else [status] * self.count


class Transfers:
    """Copies for one client.  ``prefix`` is the identity's digest.  Any thread, each with a link of its own.

    A batch is copied in parts.  While one is copied the daemon answers about the next one, and publishes the one
    before.
    """

    def __init__(self, prefix: bytes, shares: CopyShares) -> None:
        self._prefix = prefix
        self._shares = shares

    def put(self, link: Link, batch: PutBatch, deadline: float, statuses: list[PutStatus]) -> None:
        """Store ``batch``; appends to ``statuses`` what became of each object.  Raises as the link does.

        When the time is over, the last ones are left out.
        """
        while len(statuses) < len(batch.keys) and time.monotonic() < deadline:
            ending: deque[tuple[int | None, list[PutStatus]]] = deque()
            for written, found in self._write(link, batch, len(statuses), deadline):
                asked = None if written is None else link.ask_publish(written.number, written.checksums, deadline)
                ending.append((asked, found))
                if len(ending) > 1:
                    statuses += _published(link, *ending.popleft(), deadline)
            for number, found in ending:
                statuses += _published(link, number, found, deadline)

    def stage(self, link: Link, batch: PutBatch, deadline: float, statuses: list[PutStatus]) -> list[Written]:
        """As :meth:`put`, but nothing is published: the grants that are to be."""
        grants = []
        while len(statuses) < len(batch.keys) and time.monotonic() < deadline:
            for written, found in self._write(link, batch, len(statuses), deadline):
                if written is not None:
                    grants.append(written)
                statuses += found
        return grants

    def get(self, link: Link, keys: Sequence[bytes], views: Views, deadline: float, statuses: list[GetStatus]) -> None:
        """Fill ``views``; appends to ``statuses`` what became of each object.  Raises as the link does.

        When the time is over, the last ones are left out.
        """
        while len(statuses) < len(keys) and time.monotonic() < deadline:
            for found in self._read(link, keys, views, len(statuses), deadline):
                statuses += found
        for index, status in enumerate(statuses):
            if status is GetStatus.CORRUPT:
                statuses[index] = self._read_again(link, keys[index : index + 1], views[index : index + 1], deadline)

    def _read_again(self, link: Link, keys: Sequence[bytes], views: Views, deadline: float) -> GetStatus:
        """Have the daemon look at an object that did not verify: there may be a good copy of it on SSD."""
        link.doubt(keys, deadline)
        found = list(self._read(link, keys, views, 0, deadline))
        if not found:
            return GetStatus.TIMED_OUT
        ((status,),) = found
        if status is GetStatus.CORRUPT:
            link.doubt(keys, deadline)
        return GetStatus.CORRUPT if status is GetStatus.MISS else status

    def _write(
        self, link: Link, batch: PutBatch, start: int, deadline: float
    ) -> Iterator[tuple[Written | None, list[PutStatus]]]:
        """Copy ``batch`` from ``start`` on into pages of grants, part by part; up to where one came short."""

        def ask(first: int, stop: int) -> int:
            part = batch.part(first, stop)
            return link.ask_pages(part.keys, sizes_of(part.views), [max(0, depth) for depth in part.depths], deadline)

        parts = _with_a_small_start(_parts(link, batch.views, start))
        answered = _Answered(ask, link.granted, link.give_back, parts, deadline)
        for part, places in answered:
            if places:
                yield self._write_part(link, batch.part(part.start, part.start + len(places)), part, places, deadline)
            else:
                yield None, part.nothing(PutStatus.NO_ROOM)

    def _write_part(
        self, link: Link, batch: PutBatch, part: _Part, places: Sequence[int], deadline: float
    ) -> tuple[Written | None, list[PutStatus]]:
        """Copy ``batch`` to ``places``, which are pages or say why not."""
        pages = [place if place >= 0 else None for place in places]
        if not any(page is not None for page in pages):
            link.give_back(part.number, deadline)
            return None, [messages.NOT_GRANTED[-1 - place] for place in places]
        checksums = [b""] * len(pages)
        arena = link.arena.pages

        def copy(first: int, stop: int) -> None:
            page = pages[first]
            if page is not None and time.monotonic() < deadline:
                there = arena[page : page + stop - first]
                checksums[first:stop] = copy_in(self._prefix, batch.keys, batch.views, first, there)

        self._shares.run(batch.views, pages, copy)
        statuses = [_put_status(place, checksum) for place, checksum in zip(places, checksums, strict=True)]
        return Written(part.number, checksums), statuses

    def _read(
        self, link: Link, keys: Sequence[bytes], views: Views, start: int, deadline: float
    ) -> Iterator[list[GetStatus]]:
        """Fill ``views`` from ``start`` on out of loans, part by part; up to where one came short."""
        answered = _Answered(
            lambda first, stop: link.ask_loan(keys[first:stop], deadline),
            link.lent,
            link.give_back,
            _parts(link, views, start),
            deadline,
        )
        for part, places in answered:
            there = slice(part.start, part.start + len(places))
            found = self._read_part(link, keys[there], views[there], places, deadline)
            if time.monotonic() - part.asked >= link.welcome.lease_ms / 1000:
                found = [GetStatus.TIMED_OUT if status.hit else status for status in found]
            link.give_back(part.number, deadline)
            yield found or part.nothing(GetStatus.MISS)

    def _read_part(
        self, link: Link, keys: Sequence[bytes], views: Views, places: Sequence[Place], deadline: float
    ) -> list[GetStatus]:
        """Fill ``views`` from ``places``."""
        pages: list[int | None] = []
        statuses: list[GetStatus] = []
        for place, nbytes in zip(places, sizes_of(views), strict=True):
            status = messages.LENT[place.status]
            fits = status.hit and place.nbytes == nbytes
            pages.append(place.page if fits else None)
            statuses.append(GetStatus.TIMED_OUT if fits else GetStatus.SIZE_MISMATCH if status.hit else status)
        arena = link.arena.pages

        def copy(first: int, stop: int) -> None:
            page = pages[first]
            if page is None or time.monotonic() >= deadline:
                return
            found = copy_out(self._prefix, keys, views, first, arena[page : page + stop - first])
            statuses[first:stop] = [
                messages.LENT[place.status] if checksum == place.checksum else GetStatus.CORRUPT
                for place, checksum in zip(places[first:stop], found, strict=True)
            ]

        self._shares.run(views, pages, copy)
        return statuses


class _Answered(Generic[Answer]):
    """The parts of a batch, each with what the daemon answers about it; ``ask`` was called for the next one by then.

    ``answer`` and ``give_back`` take the number that ``ask`` returned.  After an answer that comes short of its part,
    nothing more is asked for, and what was asked for already is given back.  An empty one is no such answer unless its
    part was asked for ahead: then the earlier one may have all that this client may hold.
    """

    def __init__(
        self,
        ask: Callable[[int, int], int],
        answer: Callable[[int, int, float], Sequence[Answer]],
        give_back: Callable[[int, float], None],
        bounds: Sequence[tuple[int, int]],
        deadline: float,
    ) -> None:
        self._ask = ask
        self._answer = answer
        self._give_back = give_back
        self._bounds = deque(bounds)
        self._deadline = deadline
        self._asked: deque[_Part] = deque()

    def __iter__(self) -> Iterator[tuple[_Part, Sequence[Answer]]]:
        short = False
        while True:
            self._ask_ahead()
            if not self._asked:
                return
            part = self._asked.popleft()
            answers = self._answer(part.number, part.count, self._deadline)
            if short:
                self._give_back(part.number, self._deadline)
                continue
            if len(answers) < part.count and (answers or part.ahead):
                short = True
                self._bounds.clear()
            yield part, answers

    def _ask_ahead(self) -> None:
        while self._bounds and len(self._asked) < _AHEAD:
            now = time.monotonic()
            if now >= self._deadline:
                self._bounds.clear()
            else:
                start, stop = self._bounds.popleft()
                ahead = bool(self._asked)
                self._asked.append(_Part(start, stop - start, self._ask(start, stop), now, ahead))


def _parts(link: Link, views: Views, start: int) -> list[tuple[int, int]]:
    """The objects from ``start`` on in parts of equal size: at least two where that pays."""
    most = max(1, min(link.welcome.objects // _AHEAD, _PART_BYTES // link.welcome.page_bytes))
    count = len(views) - start
    least = _PART_OBJECTS
    if isinstance(views, RowViews) and views.are_small:
        least = max(least, _PART_OF_ROWS_BYTES // max(1, views.nbytes_each))
    parts = max(-(-count // most), min(_AHEAD, count // least), 1)
    return list(pairwise(start + count * number // parts for number in range(parts + 1)))


def _with_a_small_start(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """``parts``; a large one that is alone is two: a few pages are soon had, and filled while others are evicted."""
    (start, stop), *others = parts
    few = (stop - start) // _SMALL_START
    return parts if others or few < _LEAST_START else [(start, start + few), (start + few, stop)]


def _published(link: Link, number: int | None, found: list[PutStatus], deadline: float) -> list[PutStatus]:
    """``found``, when the daemon has answered about the publication ``number``, if there is one."""
    if number is not None:
        link.published(number, deadline)
    return found


def _put_status(place: int, checksum: bytes) -> PutStatus:
    if place < 0:
        return messages.NOT_GRANTED[-1 - place]
    return PutStatus.STORED if checksum else PutStatus.TIMED_OUT
