"""Who may talk to a master: a shared token, and TLS with or without certificates of clients.

Nothing is half secured: whatever cannot be used ends the start with one sentence.  The same material serves both
protocols.
"""

from __future__ import annotations

import logging
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from umbp_connectors.master.settings import MasterConfig
from umbp_core.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_TOKEN = 4096


@dataclass(frozen=True)
class TlsMaterial:
    """PEM texts; with ``client_ca`` clients have to show a certificate (mTLS)."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext
    """The same for servers that take a context."""


@dataclass(frozen=True)
class Security:
    """What both doors ask of clients; empty and ``None`` mean that they ask nothing."""

    token: bytes
    tls: TlsMaterial | None

    @property
    def open(self) -> bool:
        """Whether everybody who reaches the port may do everything."""
        return not self.token and (self.tls is None or self.tls.client_ca is None)


def load(config: MasterConfig) -> Security:
    """Read token and certificates.  Raises ``ConfigError`` with one sentence."""
    return Security(_token(config), _tls(config))


def read_token(path: Path) -> bytes:
    """The token in ``path``.  Warns when others may read the file.  Raises ``ConfigError``."""
    text = _read(path, "token_file")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        logger.warning("umbp: %s, which holds the token, can be read by others: chmod 600 it", path)
    return checked_token(text.strip(), f"token_file {path}")


def _token(config: MasterConfig) -> bytes:
    if config.token_file is not None:
        return read_token(config.token_file)
    return checked_token(config.token.encode(), "token") if config.token else b""


def checked_token(token: bytes, where: str) -> bytes:
    """``token``, if it can be sent in a header of gRPC too; else raises ``ConfigError``, which names ``where``."""
    if not token:
        raise ConfigError(f"{where} is empty: give the shared token, or leave the key out")
    if len(token) > MAX_TOKEN or not all(33 <= byte < 127 for byte in token):
        raise ConfigError(
            f"{where} cannot be used: a token is at most {MAX_TOKEN} printable ASCII characters, no blanks"
        )
    return token


def _tls(config: MasterConfig) -> TlsMaterial | None:
    if config.tls_cert is None and config.tls_key is None and config.tls_client_ca is None:
        return None
    if config.tls_cert is None or config.tls_key is None:
        given = [key for key in ("tls_cert", "tls_key", "tls_client_ca") if config.model_dump()[key] is not None]
        missing = [key for key in ("tls_cert", "tls_key") if key not in given]
        raise ConfigError(
            f"TLS is half configured: {' and '.join(given)} without {' and '.join(missing)}; "
            "set both tls_cert and tls_key, or none of these"
        )
    certificate, key = _read(config.tls_cert, "tls_cert"), _read(config.tls_key, "tls_key")
    client_ca = None if config.tls_client_ca is None else _read(config.tls_client_ca, "tls_client_ca")
    return TlsMaterial(certificate, key, client_ca, _context(config.tls_cert, config.tls_key, config.tls_client_ca))


def _context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"tls_cert {certificate} and tls_key {key} cannot be used together: {_reason(error)}"
        ) from error
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"tls_client_ca {client_ca} holds no certificate: {_reason(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password() -> str:
    """Called for an encrypted key; without it OpenSSL would ask the terminal."""
    raise ValueError("the key is encrypted; a master needs one without a pass phrase")


def _reason(error: Exception) -> str:
    return (error.reason or str(error)) if isinstance(error, ssl.SSLError) else str(error)


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} {path} cannot be read: {error.strerror}") from error
