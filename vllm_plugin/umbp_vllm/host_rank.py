"""A rank's mapping of the daemon's memory, and its change to another one when a new daemon has come.

Mapping waits for a socket, so it is done in a thread of its own.  A mapping and what copies from and to it change
together, between two steps in which nothing is being copied.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from umbp_core.errors import StateError, UmbpError
from umbp_core.ops import Direction, LeaderTransferRequest, OpResult, OpStatus
from umbp_core.ports import Clock
from umbp_core.wire.codes import WireError
from umbp_vllm.metadata import StepMetadata
from umbp_vllm.rank_kit import Closable, RankKit

logger = logging.getLogger("vllm.umbp.host")

_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Between attempts to map; the last one from then on."""
_CLOSE_S = 5.0
_FAILURES = (OSError, WireError, UmbpError)

ARENA = "arena"
"""The label of blocks of an op that means memory of another daemon than this rank has mapped."""
LEASE = "lease"
"""The label of blocks whose load took longer than they were lent."""
_DELIVERED = frozenset({OpStatus.DONE, OpStatus.FAILED})
"""How a load ends that has written blocks: all of them, or all but those that failed."""


class Mapping(Protocol):
    """What is used of :class:`~umbp_connectors.daemon.pages.RankArena`."""

    @property
    def name(self) -> bytes:
        """Which arena it is."""
        ...

    @property
    def pages(self) -> npt.NDArray[np.uint8]:
        """This rank's stripe of all pages."""
        ...

    def open(self, deadline: float) -> None:
        """Map it."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


class HostPages:
    """Pages of an array, as a DRAM tier; rows may lie apart, not the bytes of a row."""

    staging_pages = 0

    def __init__(self, array: npt.NDArray[np.uint8], owner: Closable | None = None) -> None:
        self._array = array
        self._owner = owner
        self.pages, self.page_bytes = array.shape

    @property
    def address(self) -> int:
        """Address of page 0."""
        return int(self._array.ctypes.data)

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All pages."""
        return self._array

    def page(self, index: int, nbytes: int | None = None) -> memoryview:
        """The first ``nbytes`` of page ``index``, writable.  Raises ``StateError`` when there is no such page."""
        if not 0 <= index < self.pages or (nbytes is not None and nbytes > self.page_bytes):
            raise StateError(f"page {index} with {nbytes} bytes does not exist; there are {self.pages}")
        return memoryview(self._array[index])[:nbytes]

    def close(self) -> None:
        """Let go of the mapping.  Idempotent."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.close()


def no_pages(page_bytes: int) -> HostPages:
    """What a rank has while there is no daemon: a page that nobody uses."""
    return HostPages(np.zeros((1, page_bytes), dtype=np.uint8))


class RankHost:
    """Maps arenas for one rank.  :meth:`open` may wait; the other methods are the forward thread's and never do.

    ``clock`` says until when what was lent may be read: that of this host, ``time.monotonic``.
    """

    def __init__(
        self,
        new_mapping: Callable[[], Mapping],
        make_kit: Callable[[bytes, HostPages], RankKit],
        page_bytes: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self._new_mapping = new_mapping
        self._make_kit = make_kit
        self._page_bytes = page_bytes
        self._clock = clock
        self._wanted: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._made: deque[RankKit] = deque()
        self._retired: deque[RankKit] = deque()
        self._asked = b""
        self._mapped = b""
        self._told = True
        self._until: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="umbp-map-host", daemon=True)

    def open(self, timeout: float) -> RankKit:
        """A first kit: with the daemon's arena if there is one within ``timeout`` seconds, else without."""
        self._thread.start()
        try:
            kit = self._kit(time.monotonic() + timeout)
        except _FAILURES as error:
            logger.warning("umbp: no daemon, so this rank has no pages until there is one: %s", error)
            kit = self._make_kit(b"", no_pages(self._page_bytes))
        self._mapped = kit.arena
        return kit

    def means(self, metadata: StepMetadata) -> bool:
        """Whether the pages that the step's ops name are those that are mapped here."""
        return metadata.arena == self._mapped

    def has_new(self, metadata: StepMetadata) -> bool:
        """Have the arena mapped that the step's ops name, if it is another one; whether there is a new kit."""
        arena = metadata.arena
        if arena and arena not in (self._mapped, self._asked):
            self._asked = arena
            self._wanted.put(arena)
        return bool(self._made)

    def change(self, old: RankKit) -> RankKit:
        """The new kit, for ``old``, which is closed in the background and in which nothing is under way."""
        new = self._made.popleft()
        self._retired.append(old)
        self._mapped, self._asked, self._told = new.arena, b"", False
        self._wanted.put(b"")
        return new

    def news(self) -> bytes | None:
        """The arena that is mapped from now on, once after each change."""
        if self._told:
            return None
        self._told = True
        return self._mapped

    def refused(self, metadata: StepMetadata, ops: list[LeaderTransferRequest]) -> dict[str, str]:
        """Those of the step's ``ops``, by id, that must not be carried out here, and why."""
        if not self.means(metadata):
            return dict.fromkeys([op.op_id for op in ops], ARENA)
        now, until = self._clock(), metadata.until
        self._until.update({op.op_id: until[op.op_id] for op in ops if until.get(op.op_id, 0.0) >= now})
        return {op.op_id: LEASE for op in ops if until.get(op.op_id, now) < now}

    def judged(self, result: OpResult) -> OpResult:
        """The result, or a failure where the pages that a load read were lent to this engine no more."""
        if result.direction is not Direction.LOAD:
            return result
        until = self._until.pop(result.op_id, None)
        if until is None or result.status not in _DELIVERED or self._clock() <= until:
            return result
        return msgspec.structs.replace(result, status=OpStatus.FAILED, failed=(), reason=LEASE)

    def close(self) -> None:
        """End the thread; a kit that nobody took is closed.  Idempotent."""
        self._closing.set()
        self._wanted.put(None)
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)
        while self._made:
            self._made.popleft().close(_CLOSE_S)

    def _kit(self, deadline: float) -> RankKit:
        mapping = self._new_mapping()
        with contextlib.ExitStack() as undo:
            undo.callback(mapping.close)
            mapping.open(deadline)
            kit = self._make_kit(mapping.name, HostPages(mapping.pages, mapping))
            undo.pop_all()
        return kit

    def _run(self) -> None:
        """Thread: map what is wanted, close what is retired."""
        while not self._closing.is_set():
            name = self._wanted.get()
            while self._retired:
                self._retired.popleft().close(_CLOSE_S)
            if name:
                self._map()

    def _map(self) -> None:
        """Try until there is an arena: it counts whichever it is, and the leader says if it is the wrong one."""
        attempt = 0
        while not self._closing.is_set():
            try:
                self._made.append(self._kit(time.monotonic() + _PAUSES_S[-1]))
                return
            except _FAILURES as error:
                pause = _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)]
                logger.debug("umbp: the daemon's memory cannot be mapped yet: %s", error)
                attempt += 1
            self._closing.wait(pause)
