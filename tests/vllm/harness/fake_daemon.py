"""A host daemon in memory, with what a test needs to make it late, silent, full or another one.

It keeps to the seam of ``umbp_connectors.daemon.pages`` and notes whatever an engine does that it must not.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from umbp_connectors.daemon.messages import HELD, LENT, TierFill
from umbp_connectors.daemon.pages import DaemonArena, Found, NewObject, Place
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.tiers import Tier
from umbp_vllm import host_setup
from umbp_vllm.host_setup import HostPlan

GATE_SECONDS = 120.0
DEAD = 0xEE
"""What a page holds that is nobody's."""


class FakeDaemon:
    """One pool.  Thread-safe."""

    def __init__(self, pages: int = 512, lease_s: float = 60.0, objects: int = 32) -> None:
        self.pages, self.lease_s, self.objects = pages, lease_s, objects
        self.lock = threading.RLock()
        self.faults: list[str] = []
        self.down = False
        self.answers = threading.Event()
        self.answers.set()
        self.calls: list[str] = []
        self.numbers = itertools.count(1)
        self.name = b""
        self.memory: Any = None
        self._shape = (0, 0)
        self.grants_nothing = False
        self.most_loans = HELD
        self.refused_loans = 0
        """How often it was asked for one more."""
        self.holds_at = ""
        """The call at which it stops to answer."""
        self.fails: list[str] = []
        """Calls of which the next one fails, each."""

    def serve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be the daemon of this host, for every engine that starts."""
        monkeypatch.setattr(host_setup, "new_client", lambda plan: FakeClient(self, plan))
        monkeypatch.setattr(host_setup, "new_mapping", lambda plan, stripe: FakeMapping(self, plan, stripe))

    def attach(self, plan: HostPlan) -> DaemonArena:
        """A client comes."""
        with self.lock:
            if self.down:
                raise ConnectionRefusedError("there is no daemon")
            shape = (plan.page_bytes, len(plan.identities))
            if not self.name:
                self._shape = shape
                self._begin()
            assert shape == self._shape
            return DaemonArena(self.name, self.pages, shape[0], shape[1], self.lease_s, self.objects)

    def _begin(self) -> None:
        page_bytes, stripes = self._shape
        self.name = os.urandom(16)
        self.memory = np.full((self.pages, stripes, page_bytes), DEAD, dtype=np.uint8)
        self.free = list(range(self.pages))
        self.granted: set[int] = set()
        self.dirty: set[int] = set()
        """Free pages that hold something because somebody was still reading it."""
        self.objects_of: dict[bytes, tuple[int, int, bytes]] = {}
        self.loans: dict[int, list[int]] = {}

    def kill(self) -> None:
        """It dies, and with it what it holds; mappings stay."""
        with self.lock:
            self.down = True
            self.name = b""

    def restart(self) -> None:
        """Another one comes."""
        with self.lock:
            self._begin()
            self.down = False

    def forget_leases(self) -> None:
        """The leases of all loans have ended: what was lent may be gone at once."""
        with self.lock:
            self.loans.clear()
            for key in list(self.objects_of):
                self._evict(key)

    def forget_objects(self) -> None:
        """Everything is evicted that nobody reads."""
        with self.lock:
            pinned = self.pinned()
            for key in [key for key, (page, _, _) in self.objects_of.items() if page not in pinned]:
                self._evict(key)

    def pinned(self) -> set[int]:
        """Pages that somebody reads."""
        return {page for pages in self.loans.values() for page in pages}

    def _evict(self, key: bytes) -> None:
        page, _, _ = self.objects_of.pop(key)
        if page in self.pinned():
            self.dirty.add(page)
        else:
            self.memory[page] = DEAD
        self.free.append(page)

    def take(self, count: int) -> list[int]:
        """Grant pages, evicting the oldest."""
        with self.lock:
            pages: list[int] = []
            pinned = self.pinned()
            while len(pages) < count and not self.grants_nothing:
                usable = [page for page in self.free if page not in pinned]
                if usable:
                    self.free.remove(usable[0])
                    pages.append(usable[0])
                    continue
                victim = next((key for key, (page, _, _) in self.objects_of.items() if page not in pinned), None)
                if victim is None:
                    break
                self._evict(victim)
            self.granted.update(pages)
            self.dirty.difference_update(pages)
            return pages

    def scribbled(self) -> list[int]:
        """Free pages that somebody wrote to."""
        with self.lock:
            clean = [page for page in self.free if page not in self.dirty] if self.name else []
            return [page for page in clean if not (self.memory[page] == DEAD).all()]

    def publish(self, objects: Sequence[NewObject]) -> list[PutStatus]:
        """Take what was written."""
        statuses = []
        with self.lock:
            for new in objects:
                if new.page not in self.granted:
                    self.faults.append(f"published page {new.page}, which was not granted")
                    statuses.append(PutStatus.NO_ROOM)
                elif new.key in self.objects_of:
                    statuses.append(PutStatus.PRESENT)
                else:
                    self.granted.discard(new.page)
                    self.objects_of[new.key] = new.page, new.nbytes, new.checksums
                    statuses.append(PutStatus.STORED)
        return statuses


class FakeClient:
    """The leader's connection."""

    def __init__(self, daemon: FakeDaemon, plan: HostPlan) -> None:
        self._daemon = daemon
        self._plan = plan
        self._name: bytes | None = None
        self._last = b""
        self._mine: set[int] = set()

    def connect(self, deadline: float) -> DaemonArena:
        self._pass("connect", deadline, connected=False)
        arena = self._daemon.attach(self._plan)
        known, self._last = arena.name == self._last, arena.name
        self._name = arena.name
        if not known:
            return arena
        with self._daemon.lock:
            mine = tuple(sorted(self._mine & self._daemon.granted))
        return msgspec.structs.replace(arena, known=True, taken=mine)

    def take_pages(self, count: int, deadline: float) -> list[int]:
        self._pass("take_pages", deadline)
        pages = self._daemon.take(count)
        self._mine.update(pages)
        return pages

    def publish(self, objects: Sequence[NewObject], deadline: float) -> list[PutStatus]:
        self._pass("publish", deadline)
        return self._daemon.publish(objects)

    def look_up(self, keys: Sequence[bytes], prefix: bool, deadline: float) -> Found:
        self._pass("look_up", deadline)
        with self._daemon.lock:
            there = bytes(key in self._daemon.objects_of for key in keys)
        return Found((there + b"\0").index(0), b"" if prefix else there)

    def borrow(self, keys: Sequence[bytes], deadline: float) -> tuple[int, list[Place]]:
        self._pass("borrow", deadline)
        daemon = self._daemon
        number = next(daemon.numbers)
        places = []
        with daemon.lock:
            if sum(map(bool, daemon.loans.values())) >= daemon.most_loans:
                daemon.refused_loans += 1
                return number, []
            pages = daemon.loans[number] = []
            for key in keys:
                known = daemon.objects_of.get(key)
                if known is None:
                    places.append(Place(LENT.index(GetStatus.MISS), 0, 0, b""))
                else:
                    pages.append(known[0])
                    places.append(Place(LENT.index(GetStatus.DRAM), *known))
        return number, places

    def give_back(self, number: int, deadline: float) -> None:
        self._pass("give_back", deadline)
        with self._daemon.lock:
            self._daemon.loans.pop(number, None)

    def doubt(self, keys: Sequence[bytes], deadline: float) -> None:
        self._pass("doubt", deadline)
        with self._daemon.lock:
            for key in keys:
                if key in self._daemon.objects_of:
                    self._daemon._evict(key)

    def clear(self, deadline: float) -> int:
        self._pass("clear", deadline)
        with self._daemon.lock:
            count = len(self._daemon.objects_of)
            for key in list(self._daemon.objects_of):
                self._daemon._evict(key)
        return count

    def fills(self, deadline: float) -> Sequence[TierFill]:
        self._pass("fills", deadline)
        with self._daemon.lock:
            free, held = len(self._daemon.free), len(self._daemon.objects_of)
        return [TierFill(int(Tier.DRAM), self._daemon.pages, free, held, 0, 0)]

    def close(self) -> None:
        self._name = None

    def _pass(self, what: str, deadline: float, connected: bool = True) -> None:
        """Wait until the daemon answers, or raise as the real one's client does."""
        daemon = self._daemon
        daemon.calls.append(what)
        if what == daemon.holds_at:
            daemon.holds_at = ""
            daemon.answers.clear()
        if what in daemon.fails:
            daemon.fails.remove(what)
            self.close()
            raise ConnectionResetError("the test breaks the connection")
        if not daemon.answers.wait(min(GATE_SECONDS, max(0.0, deadline - time.monotonic()))):
            self.close()
            raise TimeoutError("the daemon does not answer")
        if daemon.down or (connected and daemon.name != self._name):
            self.close()
            raise ConnectionResetError("the daemon is gone")


class FakeMapping:
    """A rank's connection."""

    def __init__(self, daemon: FakeDaemon, plan: HostPlan, stripe: int) -> None:
        self._daemon = daemon
        self._plan = plan
        self._stripe = stripe
        self.name = b""
        self.pages: Any = None

    def open(self, deadline: float) -> None:
        self.name = self._daemon.attach(self._plan).name
        self.pages = self._daemon.memory[:, self._stripe, :]

    def close(self) -> None:
        self.pages = None
