"""A pool in the host's daemon, with the interface of a pool in this process."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from umbp_connectors.daemon import messages
from umbp_connectors.daemon.doors import Door, is_missing
from umbp_connectors.daemon.follower import PoolFollower
from umbp_connectors.daemon.keys import checked
from umbp_connectors.daemon.link import Link, attach
from umbp_connectors.daemon.links import Links, Way
from umbp_connectors.daemon.mapping import MappedArena
from umbp_connectors.daemon.messages import Attach, PoolStats
from umbp_connectors.daemon.transfers import Transfers, Written
from umbp_connectors.pool.books import PoolObserver
from umbp_connectors.pool.buffers import ScatteredSource, ScatteredTarget
from umbp_connectors.pool.outcomes import GetStatus, PoolCounters, PutStatus, secured
from umbp_connectors.pool.put_batch import PutBatch, put_batch
from umbp_connectors.pool.rows import targets_of
from umbp_connectors.pool.shares import CopyShares
from umbp_connectors.pool.staged import StagedPut
from umbp_core.directory import TierStats
from umbp_core.errors import StateError, TierUnavailable
from umbp_core.ids import Identity
from umbp_core.tiers import Tier

_LOOKUP_S = 1.0
"""A lookup that takes longer than this is a miss: a request waits for it."""
_FLUSH_MORE_S = 2.0
"""How long the answer to a flush may take beyond the time that the daemon gets for it."""


class Starter(Protocol):
    """Starts a daemon where none is."""

    def start(self, timeout: float) -> bool:
        """Start it, unless somebody does already, and wait until it is ready; whether it is."""
        ...

    def start_soon(self) -> None:
        """The same in the background."""
        ...


@dataclass(frozen=True, slots=True)
class DaemonClientConfig:
    """Which daemon, and how large a pool is wanted should it have none of this identity; see ``LocalPoolConfig``.

    Calls that name no time have ``timeout_s`` seconds.  ``label`` is what ``umbp daemon --status`` calls this client.
    """

    door: Door
    object_bytes: int
    dram_bytes: int
    rank: int = 0
    ranks: int = 1
    ssd_share: float = 1.0
    timeout_s: float = 3.0
    copy_threads: int = 2
    prefault: bool = True
    label: str = ""
    start_timeout_s: float = 30.0


class DaemonPool:
    """Put, get and exists of a pool that the daemon at ``config.door`` keeps, with what ``LocalPool`` promises.

    The calling threads copy between the caller's buffers and the daemon's memory, which is mapped here, and verify what
    they read.  A daemon that is missing, hanging, killed or of another version costs misses and nothing else: every
    call ends within its time and a little, and connects anew when there is one again.  ``starter`` starts one.  Any
    thread, after :meth:`open`.
    """

    def __init__(self, identity: Identity, config: DaemonClientConfig, starter: Starter | None = None) -> None:
        self._identity = identity
        self._config = config
        self._starter = starter
        self._lock = threading.Lock()
        self._puts: Counter[PutStatus] = Counter()
        self._gets: Counter[GetStatus] = Counter()
        self._arena: MappedArena | None = None
        self._links: Links | None = None
        self._closed = False
        self._unflushed: set[bytes] = set()  # memory of daemons to which this client stored since it flushed last
        self._follower: PoolFollower | None = None
        self._shares = CopyShares(config.copy_threads)
        self._transfers = Transfers(identity.digest, self._shares)
        self._greeting = Attach(
            messages.REVISION,
            os.urandom(messages.TOKEN_BYTES),
            identity.namespace,
            identity.layout,
            messages.scope_of(identity),
            config.object_bytes,
            config.dram_bytes,
            config.rank,
            config.ranks,
            config.ssd_share,
            b"",
            config.label or f"process {os.getpid()}",
        )

    @property
    def identity(self) -> Identity:
        """What all objects of this pool have in common."""
        return self._identity

    @property
    def failed(self) -> int:
        """Calls that the daemon did not answer, or not in time."""
        return self._opened().failed

    def observe(self, observer: PoolObserver) -> None:
        """See ``LocalPool.observe``: whatever the daemon has of this pool is told, in a thread of its own.

        While there is no daemon, nothing of it is there.  Raises ``StateError`` when the pool is open.
        """
        if self._links is not None:
            raise StateError("this pool is open already; name its observer before")
        self._follower = PoolFollower(self._config.door, self._identity.digest, observer, self._attach)

    def call_observer(self) -> None:
        """See ``LocalPool.call_observer``."""
        if self._follower is not None:
            self._follower.call_observer()

    def open(self) -> None:
        """Connect, starting a daemon if that is wanted.  When there is none, the log says so, and calls are misses."""
        if self._links is not None:
            raise StateError("this pool is already open")
        self._links = Links(self._connect, self._absent)
        wait = self._config.timeout_s
        if self._starter is not None and is_missing(self._config.door):
            self._starter.start(self._config.start_timeout_s)
            wait = self._config.start_timeout_s
        self._links.call(Way.ASK, time.monotonic() + wait, lambda link: None)
        if self._follower is not None:
            self._follower.open()

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[ScatteredSource],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[PutStatus]:
        """See ``LocalPool.put``.  What the daemon does not take is ``NO_ROOM``, or ``TIMED_OUT`` when time is over."""
        deadline = self._deadline(timeout)
        batch = put_batch(checked(keys), buffers, depths, deadline)
        statuses: list[PutStatus] = []
        links: list[Link] = []

        def work(link: Link) -> None:
            links.append(link)
            self._transfers.put(link, batch, deadline, statuses)

        self._opened().call(Way.PUT, deadline, work)
        self._note({link.arena.name for link in links if PutStatus.STORED in statuses})
        statuses = self._finish_put(batch, statuses, deadline)
        if any(link.welcome.strict for link in links):
            return secured(keys, statuses, lambda stored: self._secure(stored, deadline))
        return statuses

    def stage(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[ScatteredSource],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> StagedPut:
        """See ``LocalPool.stage``.  When the daemon goes meanwhile, nothing is published."""
        deadline = self._deadline(timeout)
        batch = put_batch(checked(keys), buffers, depths, deadline)
        statuses: list[PutStatus] = []
        staged: list[tuple[Link, list[Written]]] = []

        def work(link: Link) -> None:
            statuses.clear()
            staged[:] = []
            staged.append((link, self._transfers.stage(link, batch, deadline, statuses)))

        if not self._opened().call(Way.PUT, deadline, work):
            statuses.clear()  # what was granted is void, should the daemon have granted anything
        statuses = self._finish_put(batch, statuses, deadline)
        return StagedPut(statuses, lambda publish: self._settle(staged, publish))

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[ScatteredTarget], timeout: float | None = None
    ) -> list[GetStatus]:
        """See ``LocalPool.get``."""
        deadline = self._deadline(timeout)
        views = targets_of(buffers)
        if views is None or len(keys) != len(views):
            raise ValueError(f"{len(keys)} keys need as many buffers that can be written, got {len(buffers)}")
        checked(keys)
        statuses: list[GetStatus] = []
        self._opened().call(Way.GET, deadline, lambda link: self._transfers.get(link, keys, views, deadline, statuses))
        rest = GetStatus.TIMED_OUT if time.monotonic() >= deadline else GetStatus.MISS
        statuses += [rest] * (len(keys) - len(statuses))
        with self._lock:
            self._gets.update(statuses)
        return statuses

    def exists(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        """Which of ``keys`` can be read now; none while the daemon does not answer."""
        checked(keys)
        deadline = self._lookup_deadline(timeout)
        there: list[bool] = []

        def ask(link: Link) -> None:
            there.clear()
            for start in range(0, len(keys), messages.KEYS):
                part = keys[start : start + messages.KEYS] if len(keys) > messages.KEYS else keys
                found = link.look_up(part, False, deadline).there
                there.extend(map(bool, found) if 0 in found else [True] * len(found))

        self._opened().call(Way.ASK, deadline, ask)
        return there + [False] * (len(keys) - len(there))

    def count_prefix(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        """How many of ``keys``, from the first on and without a gap, can be read now."""
        checked(keys)
        deadline = self._lookup_deadline(timeout)
        count = 0

        def ask(link: Link) -> None:
            nonlocal count
            while count < len(keys):
                part = keys[count : count + messages.KEYS]
                found = link.look_up(part, True, deadline).prefix
                count += found
                if found < len(part):
                    return

        self._opened().call(Way.ASK, deadline, ask)
        return count

    def clear(self) -> int:
        """Forget every object, those of other clients of this identity too; returns how many copies could be read.

        Raises ``TierUnavailable`` when the daemon does not answer: what it has, or finds on its SSD when it comes back,
        is still there then.
        """
        deadline = self._deadline(None)
        counts: list[int] = []
        if not self._opened().call(Way.ASK, deadline, lambda link: counts.append(link.clear(deadline))):
            raise TierUnavailable(
                f"the daemon at {self._config.door} did not say that it forgot {self._identity.namespace}; "
                "clear again when it answers"
            )
        return counts[-1]

    def flush(self, timeout: float) -> bool:
        """See ``LocalPool.flush``; false also while the daemon does not answer.

        And once, with an SSD, where this client stored to a daemon that is gone: it may not have written it.
        """
        deadline = self._deadline(timeout + _FLUSH_MORE_S)
        done: list[bool] = []
        with self._lock:
            stored, self._unflushed = self._unflushed, set()

        def work(link: Link) -> None:
            lost = stored - {link.arena.name} and any(fill.tier == Tier.SSD for fill in link.stats(deadline).fills)
            done.append(link.flush(timeout, deadline) and not lost)

        if not self._opened().call(Way.ASK, deadline, work):
            self._note(stored)
        return any(done)

    def _note(self, memory: set[bytes]) -> None:
        with self._lock:
            self._unflushed |= memory

    def stats(self, tier: Tier) -> TierStats | None:
        """How full ``tier`` is; ``None`` when the pool has no such tier, or the daemon does not answer."""
        for fill in self._stats().fills:
            if fill.tier == tier:
                return TierStats(
                    fill.total_pages, fill.free_pages, fill.objects, fill.pinned, fill.reserved, fill.nbytes
                )
        return None

    def counters(self) -> PoolCounters:
        """What this client did, and what happened in the pool's SSD tier; nothing of it while nobody answers."""
        told = self._stats().counters
        with self._lock:
            puts, gets = dict(self._puts), dict(self._gets)
        return PoolCounters(
            puts={status: puts.get(status, 0) for status in PutStatus},
            gets={status: gets.get(status, 0) for status in GetStatus},
            restored=told.get("restored", 0),
            demoted=told.get("demoted", 0),
            demotions_failed=told.get("demotions_failed", 0),
            fenced=told.get("fenced", 0),
            fenced_loads=told.get("fenced_loads", 0),
            demotions_dropped=told.get("demotions_dropped", 0),
            trimmed={tier: told[name] for tier in Tier if (name := f"trimmed_{tier.name.lower()}") in told},
        )

    def wait_prefaulted(self, timeout: float) -> bool:
        """Wait until the daemon's memory is present in this process, for at most ``timeout`` seconds."""
        arena = self._arena
        return arena is None or arena.wait_present(timeout)

    def close(self) -> None:
        """Leave the daemon, which keeps what it has; idempotent."""
        links = self._links
        if self._follower is not None:
            self._follower.close()
        if links is not None:
            links.close()
        with self._lock:
            arena, self._arena = self._arena, None
            self._closed = True
        if arena is not None:
            arena.close()
        self._shares.close(wait_for_them=False)

    def _opened(self) -> Links:
        links = self._links
        if links is None or self._closed:
            raise StateError("this pool is not open")
        return links

    def _deadline(self, timeout: float | None) -> float:
        self._opened()
        return time.monotonic() + (self._config.timeout_s if timeout is None else timeout)

    def _lookup_deadline(self, timeout: float | None) -> float:
        return self._deadline(min(self._config.timeout_s if timeout is None else timeout, _LOOKUP_S))

    def _connect(self, deadline: float) -> Link:
        """A new connection, with the arena that is mapped already if that is still the daemon's."""
        known = self._arena
        greeting = msgspec.structs.replace(self._greeting, mapped=known.name) if known is not None else self._greeting
        link = attach(self._config.door, greeting, known, self._config.prefault, deadline)
        with self._lock:
            old, self._arena = self._arena, link.arena
        if old is not None and old is not link.arena:
            old.close()
        return link

    def _attach(self, deadline: float) -> None:
        """Be a client of the daemon, so that it has the pool."""
        self._opened().call(Way.ASK, deadline, lambda link: link.look_up([], True, deadline))

    def _absent(self) -> None:
        if self._starter is not None:
            self._starter.start_soon()

    def _secure(self, keys: Sequence[bytes], deadline: float) -> list[bytes]:
        """Those of ``keys`` that are on SSD by ``deadline``, as far as the daemon says so."""
        durable: list[bytes] = []
        self._opened().call(Way.PUT, deadline, lambda link: durable.extend(link.secure(keys, deadline)))
        return durable

    def _finish_put(self, batch: PutBatch, statuses: list[PutStatus], deadline: float) -> list[PutStatus]:
        rest = PutStatus.TIMED_OUT if time.monotonic() >= deadline else PutStatus.NO_ROOM
        statuses = statuses + [rest] * (len(batch.keys) - len(statuses))
        with self._lock:
            self._puts.update(statuses)
        return statuses

    def _settle(self, staged: Sequence[tuple[Link, list[Written]]], publish: bool) -> bool:
        """Publish or give back what was staged, over the very connection that it was granted to."""
        if not staged or self._closed:
            return False
        ((own, grants),) = staged
        deadline = time.monotonic() + self._config.timeout_s
        done: list[bool] = []

        def work(link: Link) -> None:
            if link is not own:
                return
            for written in grants:
                if publish:
                    done.append(link.publish(written.number, written.checksums, deadline))
                else:
                    link.give_back(written.number, deadline)

        self._opened().call(Way.PUT, deadline, work)
        if any(done):
            self._note({own.arena.name})
        return publish and len(done) == len(grants) and all(done)

    def _stats(self) -> PoolStats:
        deadline = self._lookup_deadline(None)
        found: list[PoolStats] = []
        self._opened().call(Way.ASK, deadline, lambda link: found.append(link.stats(deadline)))
        return found[0] if found else PoolStats([], {})
