"""Sockets as the protocol wants them.

Over TCP a small frame never waits for the acknowledgement of the one before, and a peer that vanished is noticed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from tests.master.native.harness import DEADLINE, Master, client
from umbp_connectors.client.native_async import NativeAsyncClient


def connected_to(port: int) -> Iterator[socket.socket]:
    """The sockets of this process, which has both ends, that are connected and have ``port`` at one end."""
    for name in Path("/dev/fd").iterdir():
        try:
            number = os.dup(int(name.name))
        except OSError:  # the listing's own, which is closed by now
            continue
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            os.close(number)
            continue
        with socket.socket(fileno=number) as found:
            try:
                ends = (found.getsockname(), found.getpeername())
            except OSError:
                continue
            if found.family == socket.AF_INET and port in (ends[0][1], ends[1][1]):
                yield found


OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)]


def set_at(port: int) -> list[list[bool]]:
    """Of each end which of the options it has."""
    return [[bool(found.getsockopt(*option)) for option in OPTIONS] for found in connected_to(port)]


def test_both_ends_send_at_once_and_notice_a_lost_peer(running: Master) -> None:
    _, port = running.serve()
    with client(("127.0.0.1", port)) as it:
        assert it.match([b"a"], False, DEADLINE) == []
        assert set_at(port) == [[True, True], [True, True]]


def test_so_they_do_with_a_client_on_a_loop(running: Master) -> None:
    _, port = running.serve()

    async def work() -> list[list[bool]]:
        it = NativeAsyncClient(("127.0.0.1", port))
        assert await it.match([b"a"], False, DEADLINE) == []
        found = set_at(port)
        it.close()
        return found

    assert asyncio.run(asyncio.wait_for(work(), DEADLINE)) == [[True, True], [True, True]]
