"""An engine with ranks, over the daemon: a leader that names keys, and ranks that copy their part."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.connectors.daemon.kit import IDENTITY, PAGES, SIZE, key_of
from umbp_connectors.daemon import messages
from umbp_connectors.daemon.doors import Door
from umbp_connectors.daemon.pages import DaemonArena, NewObject, PageClient, Place, RankArena, WantedPages, engine_token
from umbp_connectors.pool.buffers import Bytes
from umbp_connectors.pool.checksums import object_checksum
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.ids import Identity, RankScope


def soon(seconds: float = 30.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds


def identities_of(ranks: int) -> tuple[Identity, ...]:
    """Those of an engine's ranks; that of a single one is what other clients use."""
    if ranks == 1:
        return (IDENTITY,)
    return tuple(replace(IDENTITY, rank=RankScope(tp_rank=rank, tp_size=ranks)) for rank in range(ranks))


def wanted(door: Door, ranks: int = 1, name: str = "engine", pages: int = PAGES, size: int = SIZE) -> WantedPages:
    """What an engine of this name asks for."""
    return WantedPages(door, identities_of(ranks), size, pages * size * ranks, engine_token(name), name)


class Engine:
    """Leader and ranks in one process.  ``data`` of an object is the parts of all ranks, one after the other."""

    def __init__(self, door: Door, ranks: int = 1, name: str = "engine", pages: int = PAGES, size: int = SIZE) -> None:
        self.wanted = wanted(door, ranks, name, pages, size)
        self.leader = PageClient(self.wanted)
        self.ranks = [RankArena(self.wanted, stripe, prefault=False) for stripe in range(ranks)]
        self.arena: DaemonArena

    def open(self) -> DaemonArena:
        """Connect leader and ranks."""
        for rank in self.ranks:
            rank.open(soon())
        self.arena = self.leader.connect(soon())
        return self.arena

    def close(self) -> None:
        self.leader.close()
        for rank in self.ranks:
            rank.close()

    def take(self, count: int) -> list[int]:
        """Pages without keys."""
        return self.leader.take_pages(count, soon())

    def write(self, page: int, number: int, data: bytes) -> NewObject:
        """What every rank does to store ``data`` as object ``number``."""
        nbytes = len(data) // len(self.ranks)
        sums = b""
        for stripe, (rank, identity) in enumerate(zip(self.ranks, self.wanted.identities, strict=True)):
            row: Bytes = rank.pages[page, :nbytes]
            row[:] = np.frombuffer(data, np.uint8)[stripe * nbytes : (stripe + 1) * nbytes]
            sums += object_checksum(identity.object_key(key_of(number)), row)
        return NewObject(page, key_of(number), nbytes, number, sums)

    def store(self, pages: Sequence[int], objects: dict[int, bytes]) -> list[PutStatus]:
        """Write objects into these pages, and publish them."""
        pairs = zip(pages, objects.items(), strict=True)
        return self.leader.publish([self.write(page, number, data) for page, (number, data) in pairs], soon())

    def read(self, number: int, place: Place) -> bytes:
        """The bytes of an object that was borrowed, which verify."""
        parts = []
        for stripe, (rank, identity) in enumerate(zip(self.ranks, self.wanted.identities, strict=True)):
            row = rank.pages[place.page, : place.nbytes]
            expected = place.checksum[16 * stripe : 16 * stripe + 16]
            assert object_checksum(identity.object_key(key_of(number)), row) == expected, number
            parts.append(row.tobytes())
        return b"".join(parts)

    def fetch(self, numbers: Sequence[int]) -> dict[int, bytes]:
        """What can be read of these, byte by byte."""
        loan, places = self.leader.borrow([key_of(number) for number in numbers], soon())
        found = {
            number: self.read(number, place)
            for number, place in zip(numbers, places, strict=False)
            if messages.LENT[place.status].hit
        }
        self.leader.give_back(loan, soon())
        return found

    def statuses(self, numbers: Sequence[int]) -> list[GetStatus]:
        """Where these are found."""
        loan, places = self.leader.borrow([key_of(number) for number in numbers], soon())
        self.leader.give_back(loan, soon())
        return [messages.LENT[place.status] for place in places]
