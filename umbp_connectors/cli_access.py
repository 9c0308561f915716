"""Which master a command asks, and how it gets there: the options that all asking commands share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umbp_core.errors import ConfigError, MasterError, MasterUnavailable

if TYPE_CHECKING:
    from umbp_connectors.client.dial import ClientTls
    from umbp_connectors.client.native_async import NativeAsyncClient
    from umbp_core.master.transport import MasterTransport, NativeTransport

HASHES_PER_CALL = 1024
"""Hashes that a command asks for, or about, at a time."""

DEFAULT_MASTER = "umbp://127.0.0.1:50052,grpc://127.0.0.1:50051"

LONGEST_S = 86_400.0
"""No command waits longer for one thing."""

MasterOption = Annotated[
    str,
    typer.Option(
        "--master",
        metavar="ADDRESS",
        envvar="UMBP_MASTER_ADDRESS",
        help="umbp://, umbp+unix:// or grpc:// address, or HOST:PORT; several, separated by commas, are alternatives.",
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option("--token-file", metavar="PATH", envvar="UMBP_MASTER_TOKEN_FILE", help="File with the master's token."),
]
CaOption = Annotated[
    Path | None,
    typer.Option("--tls-ca", metavar="PATH", envvar="UMBP_MASTER_TLS_CA", help="Use TLS, and trust this CA (PEM)."),
]
CertOption = Annotated[Path | None, typer.Option("--tls-cert", metavar="PATH", help="Certificate to show (PEM).")]
KeyOption = Annotated[Path | None, typer.Option("--tls-key", metavar="PATH", help="Its private key (PEM).")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.01, max=LONGEST_S, help="Deadline of a call.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@dataclass(frozen=True, slots=True)
class MasterAccess:
    """What the shared options said."""

    master: str
    token_file: Path | None
    tls_files: tuple[Path | None, Path | None, Path | None]
    timeout: float
    as_json: bool

    @contextmanager
    def connected(self) -> Iterator[MasterTransport]:
        """A connection to the first of the addresses that answers.  Raises a ``UmbpError``.

        Without a file the token comes from the environment; other users would see an argument.
        """
        from umbp_connectors.client.addresses import parse_addresses
        from umbp_connectors.client.dial import Dialer

        dialer = Dialer(self._token(), self._tls(), role="cli")
        failures = []
        for address in parse_addresses(self.master):
            try:
                transport = dialer(address, self.timeout)
            except MasterError as error:
                failures.append(error)
                continue
            try:
                yield transport
            finally:
                transport.close()
            return
        if len(failures) == 1:
            raise failures[0]
        raise MasterUnavailable("no master answers: " + "; ".join(map(str, failures)))

    def native_clients(self) -> list[Callable[[], NativeAsyncClient]]:
        """What makes an asyncio client, for each of the addresses at which the native protocol may be spoken.

        Raises a ``ConfigError``, also when there is no such address.
        """
        from umbp_connectors.client.addresses import Wire, parse_addresses
        from umbp_connectors.client.native_async import NativeAsyncClient
        from umbp_connectors.client.native_session import Identity

        found = [address for address in parse_addresses(self.master) if address.wire is not Wire.GRPC]
        if not found:
            raise ConfigError(
                "UMBP's gRPC cannot be watched; give the umbp:// address of one of our masters by --master"
            )
        identity = Identity(role="cli", token=self._token().encode())
        tls = self._tls()
        context = None if tls is None else tls.context
        return [
            functools.partial(NativeAsyncClient, each.path, identity)
            if each.wire is Wire.NATIVE_UNIX
            else functools.partial(NativeAsyncClient, (each.host, each.port), identity, tls=context)
            for each in found
        ]

    def _token(self) -> str:
        from umbp_connectors.master.security import read_token

        secret = os.environ.get("UMBP_MASTER_TOKEN", "")
        return secret if self.token_file is None else read_token(self.token_file).decode()

    def _tls(self) -> ClientTls | None:
        from umbp_connectors.client.dial import ClientTls

        return ClientTls(*self.tls_files) if any(self.tls_files) else None


def native_of(transport: MasterTransport, wish: str) -> NativeTransport:
    """``transport``, if it can do what is wished for.  Raises ``ConfigError``."""
    from umbp_core.master.transport import is_native

    if not is_native(transport):
        raise ConfigError(f"UMBP's gRPC cannot {wish}; give the umbp:// address of one of our masters by --master")
    return transport


def _access(
    master: MasterOption = DEFAULT_MASTER,
    token_file: TokenFileOption = None,
    tls_ca: CaOption = None,
    tls_cert: CertOption = None,
    tls_key: KeyOption = None,
    timeout: TimeoutOption = 5.0,
    as_json: JsonOption = False,
) -> MasterAccess:
    return MasterAccess(master, token_file, (tls_ca, tls_cert, tls_key), timeout, as_json)


def asks_master(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the shared options behind its own, which it gets as one :class:`MasterAccess`.

    Typer reads a command's options off its signature, therefore the result has one of its own.
    """
    shared = inspect.signature(_access, eval_str=True).parameters.values()
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        access = _access(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(access, **given)

    options = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *shared)]
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in options}
    del run.__wrapped__  # its signature is another one
    return run
