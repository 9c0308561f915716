"""What the router knows of its workers.  No I/O; one loop's thread."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from examples.router.costs import Speeds
from umbp_connectors.prompt_hashes.hasher import Namespace

_counter = itertools.count()
_SHARE = 0.2
"""How much the latest request counts for what is usual."""


@dataclass(eq=False)
class Ticket:
    """One request that was given to a seat, until it ends."""

    seconds: float
    """What it takes until its first token, as estimated."""
    answering: bool = False
    """Whether its first bytes came: it no longer holds up who comes next, but shares the machine."""


class RankNodes(NamedTuple):
    """The nodes of an engine, or of one data-parallel rank of it: the first one, its tags, and the others."""

    name: str
    tags: Mapping[str, str]
    others: tuple[str, ...] = ()


@dataclass(eq=False)
class Seat:
    """Where a request can be served: an engine, or one data-parallel rank of it.

    ``node`` is its name at the master, empty when it has none; ``tags`` are what it registered with, and ``others`` the
    nodes of the engine's other tensor and pipeline parallel ranks.
    """

    url: str
    rank: int | None = None
    node: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    tickets: set[Ticket] = field(default_factory=set)
    used: int = -1
    """When it was last chosen, on a scale of its own; the smallest has waited longest."""

    @property
    def name(self) -> str:
        """For people, headers and labels."""
        return self.url if self.rank is None else f"{self.url}#dp{self.rank}"

    @property
    def outstanding(self) -> int:
        """Requests of this router that it has and that have not ended."""
        return len(self.tickets)

    def queue_seconds(self, speeds: Speeds) -> float:
        """What a new request has to wait for, as far as this router's own requests go."""
        waiting = sum(ticket.seconds for ticket in self.tickets if not ticket.answering)
        return waiting + speeds.stream * sum(ticket.answering for ticket in self.tickets)

    def take(self, seconds: float) -> Ticket:
        """A request is on its way to it."""
        ticket = Ticket(seconds)
        self.tickets.add(ticket)
        self.used = next(_counter)
        return ticket

    def end(self, ticket: Ticket) -> None:
        """The request ended.  Idempotent."""
        self.tickets.discard(ticket)


@dataclass(eq=False)
class Worker:
    """One engine's HTTP server, at ``url`` without a slash at its end."""

    url: str
    listed: bool = False
    """Given by the user, and therefore kept when no node names it."""
    alive: bool = False
    models: Mapping[str, Namespace] = field(default_factory=dict)
    """What it serves, and what requests for it are kept apart by: adapters have a namespace."""
    seats: dict[int | None, Seat] = field(default_factory=dict)
    foreign_waiting: int = 0
    """Requests that wait in it and are not ours."""
    usual_seconds: float = 0.0
    """What our requests take it, as estimated; the latest count most."""

    def queue_seconds(self, seat: Seat, speeds: Speeds) -> float:
        """What a new request for ``seat`` has to wait for; others' requests are taken to be like ours."""
        return seat.queue_seconds(speeds) + self.foreign_waiting / max(1, len(self.seats)) * self.usual_seconds

    def take(self, seat: Seat, seconds: float) -> Ticket:
        """A request is on its way to ``seat``; give the ticket back with :meth:`Seat.end`, whatever became of it."""
        self.usual_seconds += _SHARE * (seconds - self.usual_seconds)
        return seat.take(seconds)

    def serves(self, model: str) -> bool:
        """Whether it answers, and for this model; an empty name is any."""
        return self.alive and (not model or model in self.models)


class Books:
    """All workers, by URL, and how fast they are.

    All are taken to be alike: what a few requests say about one of them is worth less than that, and would send every
    new prompt to whichever seems a little faster.
    """

    def __init__(self, speeds: Speeds) -> None:
        self.speeds = speeds
        self.workers: dict[str, Worker] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers.values())

    def add(self, url: str, *, listed: bool = False) -> Worker:
        """The worker at ``url``, which is new or not; it has one seat until its nodes are known."""
        worker = self.workers.get(url)
        if worker is None:
            worker = self.workers[url] = Worker(url, listed, seats={None: Seat(url)})
        return worker

    def seat_nodes(self, worker: Worker, nodes: Mapping[int, RankNodes]) -> None:
        """The data-parallel ranks of ``worker`` have these nodes; a single one needs no number.

        Seats that stay keep their tickets; without nodes the last seats stay, whose KV nobody knows any more.
        """
        if not nodes:
            for seat in worker.seats.values():
                seat.node = ""
            return
        several = len(nodes) > 1
        seats: dict[int | None, Seat] = {}
        for rank, found in sorted(nodes.items()):
            number = rank if several else None
            seat = worker.seats.get(number) or Seat(worker.url, number)
            seat.node, seat.tags, seat.others = found
            seats[number] = seat
        worker.seats = seats

    def drop(self, url: str) -> None:
        """The worker is gone; requests under way end as they may."""
        self.workers.pop(url, None)

    def candidates(self, model: str) -> list[tuple[Worker, Seat]]:
        """Who could serve ``model`` now, the longest unused first."""
        found = [(worker, seat) for worker in self if worker.serves(model) for seat in worker.seats.values()]
        return sorted(found, key=lambda pair: pair[1].used)
