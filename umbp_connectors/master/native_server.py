"""The native door of a master: Unix and TCP sockets on the master's loop.

It listens, counts connections and looks at their times; what one connection does is in ``native_connection``, and what
is spoken in ``docs/protocol.md``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
from pathlib import Path
from time import monotonic

from umbp_connectors._version import __version__
from umbp_connectors.master.native_calls import NativeCalls
from umbp_connectors.master.native_connection import NativeConnection
from umbp_connectors.master.native_limits import NativeLimits
from umbp_connectors.master.native_sockets import bind_unix, inode_of, reason_of, unbind_unix
from umbp_connectors.master.service import MasterObserver, MasterService
from umbp_core.errors import ConfigError

__all__ = ["NativeLimits", "NativeServer"]

logger = logging.getLogger(__name__)

_DEFAULTS = NativeLimits()
_BACKLOG = 128


class NativeServer:
    """Serves ``service`` in the native protocol.

    ``token``, where there is one, has to be in every client's hello.  ``tls`` is for TCP; a Unix socket is for its
    owner only.  Listen on as many sockets as you like, then :meth:`stop` once.  The master's loop only.
    """

    def __init__(
        self,
        service: MasterService,
        observer: MasterObserver,
        *,
        token: bytes = b"",
        tls: ssl.SSLContext | None = None,
        limits: NativeLimits = _DEFAULTS,
    ) -> None:
        self.service = service
        self.observer = observer
        self.token = token
        self.limits = limits
        self.calls = NativeCalls(service, limits.max_hashes)
        self.name = f"umbp-connectors {__version__}"
        self._tls = tls
        self._servers: list[asyncio.Server] = []
        self._paths: dict[Path, int] = {}
        self._connections: set[NativeConnection] = set()
        self._checks: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._stopping = False

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    async def listen_tcp(self, host: str, port: int) -> int:
        """Listen on ``host``; port 0 means any free one.  Returns the port.

        Raises ``ConfigError`` when the address cannot be used, by us or because somebody else does.
        """
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(
                self._connection, host, port, ssl=self._tls, backlog=_BACKLOG, reuse_port=False
            )
        except OSError as error:
            raise ConfigError(
                f"the native protocol cannot listen on {host}:{port}: {reason_of(error)}; give another address"
            ) from error
        self._add(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_unix(self, path: Path) -> None:
        """Listen on a socket in the file system, which only this user may use.

        What a dead process left there is removed.  Raises ``ConfigError`` when somebody listens there, or it is no
        socket.
        """
        sock = bind_unix(path)
        self._paths[path] = inode_of(path)
        self._add(await asyncio.get_running_loop().create_unix_server(self._connection, sock=sock, backlog=_BACKLOG))

    async def stop(self, grace: float) -> None:
        """Take no more requests, and close when those under way are answered; after ``grace`` seconds in any case."""
        self._stopping = True
        for server in self._servers:
            server.close()
        for path, inode in self._paths.items():
            unbind_unix(path, inode)
        self._paths.clear()
        for connection in list(self._connections):
            connection.stop()
        if self._connections:
            try:
                await asyncio.wait_for(self._empty.wait(), grace)
            except asyncio.TimeoutError:
                logger.warning("umbp: %d native clients did not end within %g s", len(self._connections), grace)
                for connection in list(self._connections):
                    connection.abort()
                await self._empty.wait()
        if self._checks is not None:
            self._checks.cancel()
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()

    # for connections

    def opened(self, connection: NativeConnection) -> int:
        """A connection begins; returns the number of its session, or 0 when there are too many."""
        self._connections.add(connection)
        self._empty.clear()
        full = self._stopping or len(self._connections) > self.limits.connections
        return 0 if full else secrets.randbits(62) + 1

    def closed(self, connection: NativeConnection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def _connection(self) -> NativeConnection:
        return NativeConnection(self)

    def _add(self, server: asyncio.Server) -> None:
        self._servers.append(server)
        if self._checks is None:
            self._check()

    def _check(self) -> None:
        """Let go of connections that are overdue, now and then."""
        now = monotonic()
        for connection in list(self._connections):
            reason = connection.overdue(now)
            if reason:
                connection.expire(reason)
        self._checks = asyncio.get_running_loop().call_later(self.limits.check_interval, self._check)
