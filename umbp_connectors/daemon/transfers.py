"""Batches of objects between a caller's buffers and the daemon's memory, over one connection."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from umbp_connectors.daemon import messages
from umbp_connectors.daemon.link import Link
from umbp_connectors.daemon.messages import Place
from umbp_connectors.pool.batches import PutBatch
from umbp_connectors.pool.checksums import copy_checksummed
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_connectors.pool.rows import RowViews, Views, copy_rows_in, copy_rows_out, sizes_of, stretches
from umbp_connectors.pool.shares import CopyShares

_CHUNK_BYTES = 32 << 20
"""Bytes per loan or grant, at most: copying them takes many times as long as asking."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written under one grant and is not published yet: the checksums, empty where nothing was."""

    number: int
    checksums: Sequence[bytes]


class Transfers:
    """Copies for one client.  ``prefix`` is the identity's digest.  Any thread, each with a link of its own."""

    def __init__(self, prefix: bytes, shares: CopyShares) -> None:
        self._prefix = prefix
        self._shares = shares

    def put(self, link: Link, batch: PutBatch, deadline: float, statuses: list[PutStatus]) -> None:
        """Store ``batch``; appends to ``statuses`` what became of each object.  Raises as the link does."""
        while len(statuses) < len(batch.keys):
            written, found = self._write(link, _rest(batch, link, len(statuses)), deadline)
            if written is not None:
                link.publish(written.number, written.checksums, deadline)
            statuses += found

    def stage(self, link: Link, batch: PutBatch, deadline: float, statuses: list[PutStatus]) -> list[Written]:
        """As :meth:`put`, but nothing is published: the grants that are to be."""
        grants = []
        while len(statuses) < len(batch.keys):
            written, found = self._write(link, _rest(batch, link, len(statuses)), deadline)
            if written is not None:
                grants.append(written)
            statuses += found
        return grants

    def get(self, link: Link, keys: Sequence[bytes], views: Views, deadline: float, statuses: list[GetStatus]) -> None:
        """Fill ``views``; appends to ``statuses`` what became of each object.  Raises as the link does."""
        while len(statuses) < len(keys):
            part = slice(len(statuses), len(statuses) + _chunk(link))
            found = self._read(link, keys[part], views[part], deadline)
            bad = [index for index, status in enumerate(found) if status is GetStatus.CORRUPT]
            for index in bad:  # the daemon has looked at it meanwhile: there may be a good copy on SSD
                first = part.start + index
                again = slice(first, first + 1)
                (found[index],) = self._read(link, keys[again], views[again], deadline)
                if found[index] is GetStatus.MISS:
                    found[index] = GetStatus.CORRUPT
            statuses += found

    def _write(self, link: Link, batch: PutBatch, deadline: float) -> tuple[Written | None, list[PutStatus]]:
        """Copy the first objects of ``batch`` into pages of a grant of their own, if there are any."""
        if time.monotonic() >= deadline:
            return None, [PutStatus.TIMED_OUT] * len(batch.keys)
        depths = [max(0, depth) for depth in batch.depths]
        number, places = link.reserve(batch.keys, sizes_of(batch.views), depths, deadline)
        if not places:
            return None, [PutStatus.NO_ROOM] * len(batch.keys)
        batch = batch.part(0, len(places))
        pages = [place if place >= 0 else None for place in places]
        if not any(page is not None for page in pages):
            link.give_back(number, deadline)
            return None, [messages.NOT_GRANTED[-1 - place] for place in places]
        checksums = self._shares.run(
            batch.views, lambda start, stop: self._copy_in(link, batch, pages, deadline, start, stop)
        )
        statuses = [_put_status(place, checksum) for place, checksum in zip(places, checksums, strict=True)]
        return Written(number, checksums), statuses

    def _copy_in(
        self, link: Link, batch: PutBatch, pages: Sequence[int | None], deadline: float, start: int, stop: int
    ) -> list[bytes]:
        """Copy a share; the checksums, empty for what was not copied."""
        views, arena = batch.views[start:stop], link.arena.pages
        names = [self._prefix + key for key in batch.keys[start:stop]]
        checksums: list[bytes] = []
        for first, end in stretches(views, pages[start:stop]):
            page = pages[start + first]
            if page is None or time.monotonic() >= deadline:
                checksums += [b""] * (end - first)
            elif end - first > 1 and isinstance(views, RowViews):
                there = arena[page : page + end - first, : views.nbytes_each]
                checksums += copy_rows_in(names[first:end], there, views.together(first, end))
            else:
                view = views[first]
                checksums.append(copy_checksummed(names[first], arena[page, : view.nbytes], view))
        return checksums

    def _read(self, link: Link, keys: Sequence[bytes], views: Views, deadline: float) -> list[GetStatus]:
        """Fill the first of ``views`` out of a loan of their own; what does not verify is doubted."""
        began = time.monotonic()
        if began >= deadline:
            return [GetStatus.TIMED_OUT] * len(keys)
        number, places = link.borrow(keys, deadline)
        if not places:
            link.give_back(number, deadline)
            return [GetStatus.MISS] * len(keys)
        views, sizes = views[: len(places)], sizes_of(views[: len(places)])
        pages = [
            place.page if messages.LENT[place.status].hit and place.nbytes == nbytes else None
            for place, nbytes in zip(places, sizes, strict=True)
        ]
        statuses = self._shares.run(
            views, lambda start, stop: self._copy_out(link, keys, views, places, pages, deadline, start, stop)
        )
        if time.monotonic() - began >= link.welcome.lease_ms / 1000:
            statuses = [GetStatus.TIMED_OUT if status.hit else status for status in statuses]
        link.give_back(number, deadline)
        bad = [key for key, status in zip(keys, statuses, strict=False) if status is GetStatus.CORRUPT]
        if bad:
            link.doubt(bad, deadline)
        return statuses

    def _copy_out(
        self,
        link: Link,
        keys: Sequence[bytes],
        views: Views,
        places: Sequence[Place],
        pages: Sequence[int | None],
        deadline: float,
        start: int,
        stop: int,
    ) -> list[GetStatus]:
        """Copy a share."""
        arena, mine = link.arena.pages, views[start:stop]
        names = [self._prefix + key for key in keys[start:stop]]
        statuses: list[GetStatus] = []
        for first, end in stretches(mine, pages[start:stop]):
            lent = places[start + first : start + end]
            page = pages[start + first]
            if page is None:
                status = messages.LENT[lent[0].status]
                statuses.append(GetStatus.SIZE_MISMATCH if status.hit else status)
                continue
            if time.monotonic() >= deadline:
                statuses += [GetStatus.TIMED_OUT] * (end - first)
                continue
            if end - first > 1 and isinstance(mine, RowViews):
                there = arena[page : page + end - first, : mine.nbytes_each]
                found = copy_rows_out(names[first:end], mine.together(first, end), there)
            else:
                view = mine[first]
                found = [copy_checksummed(names[first], view, arena[page, : view.nbytes])]
            statuses += [
                messages.LENT[place.status] if checksum == place.checksum else GetStatus.CORRUPT
                for place, checksum in zip(lent, found, strict=True)
            ]
        return statuses


def _chunk(link: Link) -> int:
    return min(link.welcome.objects, max(1, _CHUNK_BYTES // link.welcome.page_bytes))


def _rest(batch: PutBatch, link: Link, start: int) -> PutBatch:
    return batch.part(start, start + _chunk(link))


def _put_status(place: int, checksum: bytes) -> PutStatus:
    if place < 0:
        return messages.NOT_GRANTED[-1 - place]
    return PutStatus.STORED if checksum else PutStatus.TIMED_OUT
