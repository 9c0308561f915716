"""Connecting to a master: one way per wire."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from umbp_connectors.client.addresses import MasterAddress, Wire
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_connectors.client.native_session import Identity, NativeAddress
from umbp_core.errors import ConfigError, MasterError, MasterUnavailable
from umbp_core.master.transport import MasterTransport


@dataclass(frozen=True)
class ClientTls:
    """Files in PEM: whom to trust (by default whom the system trusts), and what to show if the master wants to see."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a client's certificate and its key come together; give both, or neither")

    @cached_property
    def context(self) -> ssl.SSLContext:
        """For sockets.  Raises ``ConfigError`` when a file cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the TLS files of the master's client cannot be used: {error}") from error
        return context

    def texts(self) -> list[bytes | None]:
        """What is in the files: trusted, certificate, key.  Raises ``ConfigError``."""
        try:
            return [None if path is None else path.read_bytes() for path in (self.ca, self.certificate, self.key)]
        except OSError as error:
            raise ConfigError(f"the TLS files of the master's client cannot be read: {error}") from error


class Dialer:
    """Connects to any address, as ``node_id`` in the role ``role``.

    ``token`` is shown to a master that wants one.  With ``tls``, TCP connections are encrypted; a Unix socket is not.
    """

    def __init__(self, token: str = "", tls: ClientTls | None = None, node_id: str = "", role: str = "node") -> None:
        self._token = token
        self._tls = tls
        self._identity = Identity(role=role, node_id=node_id, token=token.encode())
        self._ways: dict[Wire, Callable[[MasterAddress, float], MasterTransport]] = {
            Wire.NATIVE_TCP: self._native,
            Wire.NATIVE_UNIX: self._native,
            Wire.GRPC: self._grpc,
        }

    def __call__(self, address: MasterAddress, timeout: float) -> MasterTransport:
        """A connection on which the handshake is complete, within ``timeout`` seconds.

        Raises a ``MasterError``; so it does when files or packages are missing that this connection needs.
        """
        try:
            return self._ways[address.wire](address, timeout)
        except (ConfigError, ImportError) as error:
            raise MasterUnavailable(f"no connection to {address}: {error}") from error

    def _native(self, address: MasterAddress, timeout: float) -> MasterTransport:
        unix = address.wire is Wire.NATIVE_UNIX
        place: NativeAddress = address.path if unix else (address.host, address.port)
        context = None if unix or self._tls is None else self._tls.context
        client = NativeBlockingClient(place, self._identity, tls=context)
        try:
            client.open(timeout)
        except MasterError:
            client.close()
            raise
        return client

    def _grpc(self, address: MasterAddress, timeout: float) -> MasterTransport:
        from umbp_connectors.client.grpc_transport import GrpcTransport
        from umbp_connectors.wire_grpc.channel import channel_credentials

        credentials = None if self._tls is None else channel_credentials(*self._tls.texts())
        return GrpcTransport.connect(address.target, timeout, token=self._token, credentials=credentials)
