"""Following a master's index for as long as one likes: over its restarts, and over those of the connection."""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from umbp_connectors.client.native_async import NativeAsyncClient
from umbp_connectors.client.native_session import describe
from umbp_core.breaker import Backoff
from umbp_core.errors import MasterUnavailable
from umbp_core.index_feed import FeedPage


class Turn(enum.Enum):
    """What happened to a watch, beside the changes that it is about."""

    CONNECTED = "connected"
    """A master answers; changes come from here on."""
    FOLLOWING = "following"
    """The first position in the index: what was before is not told."""
    MISSED = "missed"
    """Changes between the last one and the position of now were not kept for us."""
    RESTARTED = "restarted"
    """It is another life of the index: nothing of what was told before need be true."""
    AWAY = "away"
    """No master answers; it is tried again until one does."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One turn of a watch."""

    turn: Turn
    master: str
    """The address that it is about; empty when it is about all of them."""
    incarnation: int = 0
    seq: int = 0
    """The position that changes follow."""
    missed: int = 0
    """How many changes were missed."""
    reason: str = ""
    """Why nobody answers."""


class Watcher:
    """Follows the first of some masters that answers.

    ``connect`` makes a new client for each of ``masters``, in the order of preference.  One loop's thread.
    """

    def __init__(
        self,
        connect: Sequence[Callable[[], NativeAsyncClient]],
        timeout: float,
        *,
        backoff: Backoff | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._connect = connect
        self._timeout = timeout
        self._backoff = backoff or Backoff()
        self._chance = chance
        self._incarnation = 0
        self._cursor = 0
        self._ever = False
        self._connected_at: float | None = None
        self._failures = 0

    async def follow(self) -> AsyncGenerator[Notice | FeedPage, None]:
        """Changes as they come, without those pages that have none, and every turn of the watch.

        Goes on where it was after a connection failed.  Raises ``MasterUnavailable`` when no master answers the very
        first time, and at any time what a master refuses us with.
        """
        while True:
            reasons = []
            for connect in self._connect:
                client = connect()
                try:
                    async with aclosing(self._watch(client)) as told:
                        async for each in told:
                            yield each
                except MasterUnavailable as error:
                    reasons.append(str(error))
                    if self._connected_at is not None:
                        break  # this one answered until now: the best address comes first again
                finally:
                    client.close()
            why = "; ".join(reasons)
            if not self._ever:
                raise MasterUnavailable(f"no master answers: {why}" if len(reasons) > 1 else why)
            if self._connected_at is not None:
                yield Notice(Turn.AWAY, "", reason=why)
            await self._pause()

    async def _watch(self, client: NativeAsyncClient) -> AsyncGenerator[Notice | FeedPage, None]:
        master = describe(client.address)
        await client.open(self._timeout)
        self._ever, self._connected_at = True, asyncio.get_running_loop().time()
        yield Notice(Turn.CONNECTED, master, self._incarnation, self._cursor)
        pages = client.watch(self._incarnation, self._cursor, timeout=self._timeout)
        async with aclosing(pages):
            async for page in pages:
                if page.lost:
                    yield self._lost(master, page)
                self._incarnation, self._cursor = page.incarnation, page.cursor
                if page.changes:
                    yield page

    def _lost(self, master: str, page: FeedPage) -> Notice:
        if not self._incarnation:
            return Notice(Turn.FOLLOWING, master, page.incarnation, page.cursor)
        if page.incarnation != self._incarnation:
            return Notice(Turn.RESTARTED, master, page.incarnation, page.cursor)
        missed = max(0, page.cursor - self._cursor)
        return Notice(Turn.MISSED, master, page.incarnation, page.cursor, missed)

    async def _pause(self) -> None:
        """Wait for longer each time; a connection that lasted for a while starts over."""
        loop = asyncio.get_running_loop()
        if self._connected_at is not None and loop.time() - self._connected_at > self._backoff.ceiling:
            self._failures = 0
        self._connected_at = None
        self._failures += 1
        await asyncio.wait({loop.create_future()}, timeout=self._backoff.delay(self._failures, self._chance()))
