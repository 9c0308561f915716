"""The stream of a watch: changes of the index to one client, at the pace at which it reads.

Nothing is queued for a client: the stream keeps a cursor into the feed of changes, and a client that is too slow for
what the feed keeps is told that it lost some, as is one that does not take frames as large as a single hash needs.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from umbp_connectors.master.service import MasterService, breathe
from umbp_core.index_feed import FeedPage
from umbp_core.wire.codes import ErrorCode
from umbp_core.wire.messages import Message, Watch
from umbp_core.wire.values_index import changes_message, part_of

logger = logging.getLogger(__name__)

PAGE_CHANGES = 256
"""Changes of one event; the feed bounds their hashes."""
EVENT_BYTES = 1 << 20
"""Bytes of one event, also for those that take more: others wait while it is made."""
_NO_INCARNATION = 0
"""Of no index: its changes are lost to everybody."""


class Listener(Protocol):
    """The connection that a stream writes to."""

    @property
    def stalled(self) -> bool:
        """Whether the client leaves too much unread."""
        ...

    def send_event(self, sequence: int, event: Message) -> None:
        """Send a part of the stream."""
        ...

    def stream_ended(self, sequence: int, code: ErrorCode | None, message: str = "") -> None:
        """The stream is over; without a ``code`` because the client wanted that."""
        ...


class WatchStream:
    """One watch of one connection, whose client takes events of ``limit`` bytes.  The master's loop only."""

    def __init__(
        self, listener: Listener, service: MasterService, sequence: int, request: Watch, interval: float, limit: int
    ) -> None:
        self.sequence = sequence
        self._listener = listener
        self._service = service
        self._incarnation = request.incarnation
        self._cursor = request.cursor
        self._interval = interval
        self._limit = limit
        self._told = 0
        self._writable = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False

    def start(self) -> None:
        """Begin to send."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._ended)

    def cancel(self) -> None:
        """The client wants no more; it is told when nothing more comes."""
        self._cancelled = True
        self.stop()

    def stop(self) -> None:
        """The connection ends."""
        if self._task is not None:
            self._task.cancel()

    def writable(self) -> None:
        """The client has read what it was sent."""
        self._writable.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        changed = loop.create_task(self._service.changed())
        try:
            while True:
                await breathe()  # a task that was just made listens from here on
                while self._listener.stalled:
                    self._writable.clear()
                    await self._writable.wait()
                if self._send_page():
                    continue
                if changed.done():
                    changed = loop.create_task(self._service.changed())
                    continue
                done, _ = await asyncio.wait({changed}, timeout=self._interval)
                if not done:
                    self._send(FeedPage(self._incarnation, [], self._cursor, lost=False))
        finally:
            changed.cancel()

    def _send_page(self) -> bool:
        """Send what comes next; whether there was anything."""
        page = self._service.since(self._incarnation, self._cursor, PAGE_CHANGES)
        if page.changes:
            page, self._told = part_of(page, self._told, min(self._limit, EVENT_BYTES))
            if not page.changes:
                page = self._service.since(_NO_INCARNATION, 0, PAGE_CHANGES)
        if not page.changes and not page.lost:
            return False
        if page.lost:
            self._told = 0
        self._incarnation, self._cursor = page.incarnation, page.cursor
        self._send(page)
        return True

    def _send(self, page: FeedPage) -> None:
        self._listener.send_event(self.sequence, changes_message(page))

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._listener.stream_ended(
                self.sequence,
                None if self._cancelled else ErrorCode.UNAVAILABLE,
                "" if self._cancelled else "the master stops",
            )
            return
        logger.error("umbp: a watch failed", exc_info=task.exception())
        self._listener.stream_ended(self.sequence, ErrorCode.INTERNAL, "the watch failed; the master's log says more")
