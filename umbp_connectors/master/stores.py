"""Where a master remembers its nodes, so that those that survive its restart stay routable.

What is kept is one record per node, and losing one costs hits, never correctness.  Therefore nobody waits for a store:
a thread writes behind, the last word on a node wins, and a store that is away is tried again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Protocol

import msgspec

from umbp_connectors.master.metrics import StoreStats
from umbp_connectors.master.metrics_families import Histogram
from umbp_core.errors import UmbpError
from umbp_core.master.model import ClientRecord

logger = logging.getLogger(__name__)

MAX_PENDING = 1 << 16
"""Nodes with a word that is not written yet; words on others are dropped while the store is away for so long."""
RETRY_SECONDS = 1.0
CLOSE_SECONDS = 2.0

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ClientRecord)


class StoreUnavailable(UmbpError):
    """The store cannot be read or written now; the message says which, why, and what to do about it."""


class Backend(Protocol):
    """What a store is made of.  Blocking; one thread at a time.  Every method raises ``StoreUnavailable`` only."""

    @property
    def name(self) -> str:
        """The label ``backend`` of the metrics."""
        ...

    def open(self) -> Sequence[tuple[str, bytes]]:
        """Get ready, and read everything."""
        ...

    def write(self, words: Mapping[str, bytes | None]) -> None:
        """Keep these records and forget the nodes with ``None``, all or nothing."""
        ...

    def close(self) -> None:
        """Let go of files and connections.  Idempotent; raises nothing."""
        ...


class NoStore:
    """A ``ClientStore`` that keeps nothing."""

    def load(self) -> list[ClientRecord]:
        """Nothing."""
        return []

    def catch_up(self, take: Callable[[list[ClientRecord]], None]) -> None:
        """Nothing happens."""

    def save(self, record: ClientRecord) -> None:
        """Nothing happens."""

    def delete(self, node_id: str) -> None:
        """Nothing happens."""

    def close(self) -> None:
        """Nothing happens."""

    def stats(self) -> StoreStats | None:
        """There are no figures."""
        return None


class WriteBehindStore:
    """A ``ClientStore`` that writes to ``backend`` in a thread of its own.

    :meth:`load` and :meth:`close` block and are for the start and the end of the process.  The others may be called by
    any thread and never wait for the store.  With ``required`` a backend that cannot be opened is an error of
    :meth:`load`; otherwise the start is empty and the backend is tried again with the next word.  What it has to say
    then is for :meth:`catch_up`, and nothing is written before that was called: a node that registered without its
    address must not take the place of the record that knows it.
    """

    def __init__(self, backend: Backend, *, required: bool = True) -> None:
        self._backend = backend
        self._required = required
        self._changed = threading.Condition()
        self._pending: dict[str, bytes | None] = {}
        self._writing = False
        self._closing = False
        self._opened = False
        self._late: list[ClientRecord] = []
        self._away = False
        self._errors = 0
        self._ops = {"load": Histogram(), "write": Histogram()}
        self._thread: threading.Thread | None = None

    def load(self) -> list[ClientRecord]:
        """Open the store, start the writer, and return what is known.  Raises ``StoreUnavailable``."""
        rows: Sequence[tuple[str, bytes]] = ()
        start = perf_counter()
        try:
            rows = self._backend.open()
            self._opened = True
        except StoreUnavailable as error:
            if self._required:
                self._backend.close()
                raise
            logger.warning("umbp: %s; the master starts without what it knew of nodes", error)
        self._ops["load"].observe(perf_counter() - start)
        self._thread = threading.Thread(target=self._write_behind, name="umbp-master-store", daemon=True)
        self._thread.start()
        return decoded(rows, self._backend.name)

    def catch_up(self, take: Callable[[list[ClientRecord]], None]) -> None:
        """See ``ClientStore``.  For the thread that saves and deletes."""
        with self._changed:
            if not self._late:
                return
            late = [record for record in self._late if self._pending.get(record.node_id, b"") is not None]
        take(late)
        with self._changed:
            self._late = []
            self._changed.notify_all()

    def save(self, record: ClientRecord) -> None:
        """Remember ``record`` in place of what was remembered of its node."""
        self._tell(record.node_id, _encoder.encode(record))

    def delete(self, node_id: str) -> None:
        """Forget a node."""
        self._tell(node_id, None)

    def flush(self, timeout: float) -> bool:
        """Wait until everything that was told is written; false when it was not within ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending and not self._writing, timeout)

    def close(self) -> None:
        """Write what is left, within two seconds, and close the backend.  Idempotent.

        A backend that was away a moment ago is tried once more.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            logger.warning("umbp: the %s store did not end in time; its last words may be lost", self._backend.name)

    def stats(self) -> StoreStats:
        """Figures for the metrics.  Any thread."""
        with self._changed:
            ops = {op: histogram.copy() for op, histogram in self._ops.items()}
            return StoreStats(self._backend.name, ops, self._errors)

    def _tell(self, node_id: str, word: bytes | None) -> None:
        with self._changed:
            if node_id in self._pending or len(self._pending) < MAX_PENDING:
                self._pending[node_id] = word
                self._changed.notify_all()

    def _write_behind(self) -> None:
        """Top of the writer's thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: (self._pending and not self._late) or self._closing)
                last = self._closing
            done = self._write_pending()
            with self._changed:
                if self._closing and (not self._pending or (last and not done)):
                    break
                if not done:
                    self._changed.wait_for(lambda: self._closing, RETRY_SECONDS)
        self._backend.close()

    def _write_pending(self) -> bool:
        """Write what was told, unless somebody has to catch up first; false when the store is away."""
        if not self._opened and self._pending and not self._try(self._open_late, "load"):
            return False
        with self._changed:
            if self._late and not self._closing:
                return True
            words, self._pending = self._pending, {}
            # At the end it is too late to catch up: what an earlier master knew of a node stays.
            for record in self._late:
                if words.get(record.node_id) is not None:
                    del words[record.node_id]
            self._writing = bool(words)
        written = not words or self._try(lambda: self._backend.write(words), "write")
        with self._changed:
            self._writing = False
            if not written:
                self._pending = words | self._pending
            self._changed.notify_all()
        return written

    def _open_late(self) -> None:
        late = decoded(self._backend.open(), self._backend.name)
        self._opened = True
        with self._changed:
            self._late = late

    def _try(self, work: Callable[[], None], op: str) -> bool:
        """Whether the store did ``work``."""
        start = perf_counter()
        try:
            work()
        except StoreUnavailable as error:
            with self._changed:
                self._errors += 1
            if not self._away:
                logger.warning("umbp: %s; tried again until it works", error)
            self._away = True
            return False
        with self._changed:
            self._ops[op].observe(perf_counter() - start)
        if self._away:
            logger.warning("umbp: the %s store of nodes works again", self._backend.name)
        self._away = False
        return True


def decoded(rows: Sequence[tuple[str, bytes]], store: str) -> list[ClientRecord]:
    """The records of ``rows``; those that cannot be read are left out, with one warning for all of them."""
    records, spoilt = [], []
    for node_id, content in rows:
        try:
            record = _decoder.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            spoilt.append(node_id)
            continue
        records.append(record)
    if spoilt:
        logger.warning("umbp: the %s store holds %d record(s) that cannot be read; left out", store, len(spoilt))
    return records
