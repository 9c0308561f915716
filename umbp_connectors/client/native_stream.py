"""A watch: one connection that the master writes changes to, read no faster than they are used."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator

from umbp_connectors.client.native_session import (
    STREAMED,
    Identity,
    NativeAddress,
    NativeSession,
    failure_of,
    garbled,
    unreachable,
)
from umbp_core.index_feed import FeedPage
from umbp_core.wire.codec import decode_as
from umbp_core.wire.frames import Frame, FrameType
from umbp_core.wire.messages import Watch
from umbp_core.wire.replies import Changes
from umbp_core.wire.values_index import changes_of

_READ = 1 << 16


async def watch_events(
    address: NativeAddress,
    identity: Identity,
    tls: ssl.SSLContext | None,
    start: tuple[int, int],
    timeout: float,
    silence: float,
) -> AsyncGenerator[FeedPage, None]:
    """See ``NativeAsyncClient.watch``."""
    session = NativeSession(identity, STREAMED)
    try:
        reader, writer = await asyncio.wait_for(_open(address, tls, session), timeout)
        try:
            writer.write(session.request(Watch(*start)))
            while True:
                frames = session.splitter.feed(await asyncio.wait_for(_read(reader), silence))
                for frame in frames:
                    page = _page_of(address, session, frame)
                    if page.changes or page.lost:
                        yield page
                if session.splitter.error is not None:
                    raise session.splitter.error
        finally:
            writer.transport.abort()
    except (OSError, asyncio.TimeoutError) as error:
        raise unreachable(address, error) from error


async def _open(
    address: NativeAddress, tls: ssl.SSLContext | None, session: NativeSession
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect and greet."""
    if isinstance(address, str):
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        reader, writer = await asyncio.open_connection(*address, ssl=tls)
    try:
        writer.write(session.hello())
        while not session.greeted(await _read(reader)):
            pass
    finally:
        if session.welcome is None:
            writer.transport.abort()
    return reader, writer


async def _read(reader: asyncio.StreamReader) -> bytes:
    data = await reader.read(_READ)
    if not data:
        raise ConnectionResetError("it closed the connection")
    return data


def _page_of(address: NativeAddress, session: NativeSession, frame: Frame) -> FeedPage:
    kind, sequence, payload = frame
    if kind == FrameType.ERROR:
        raise failure_of(payload)
    if kind != FrameType.EVENT or sequence != session.sequence:
        raise garbled(address, f"a frame of type {kind} to request {sequence} on a watch")
    return changes_of(decode_as(Changes, payload))
