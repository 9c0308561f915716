"""Whether the master that is configured answers, and lets us in."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator

from umbp_connectors.client.addresses import MasterAddress, parse_addresses
from umbp_connectors.client.dial import Dialer
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.doctor.findings import Finding, Status
from umbp_connectors.reporting.opening import dialer_of
from umbp_core.errors import AccessDenied, ConfigError, MasterError
from umbp_core.master.model import NodeStatus
from umbp_core.master.transport import is_native

TIMEOUT_S = 3.0
"""For one address: the connection, and likewise the question."""


def answers(config: UmbpConfig) -> Iterator[Finding]:
    """One finding per address that is asked: all up to the first that answers.  Tells the master nothing."""
    if not config.master_address:
        yield Finding("master", Status.NOTE, "none", "set master_address, and routers can see what this engine holds")
        return
    if not config.report:
        yield Finding("reports", Status.NOTE, "off (report is false)", "leave report out, and the master is told")
    try:
        dialer = dialer_of(config, role="cli")
    except ConfigError as error:
        yield Finding("master", Status.PROBLEM, str(error), "correct the file; the engine will not start")
        return
    failed = []
    for address in parse_addresses(config.master_address):
        try:
            found = _ask(dialer, address)
        except MasterError as error:
            failed.append((address, error))
            continue
        yield from _others(failed, Status.WARNING, "the next address is used until it does")
        yield Finding("master", Status.OK, found)
        return
    yield from _others(failed, Status.PROBLEM, "the engine works on, and reports later")


def _others(failed: list[tuple[MasterAddress, MasterError]], status: Status, until: str) -> Iterator[Finding]:
    for address, error in failed:
        yield Finding("master", status, f"{address} does not answer: {error}", f"{_remedy(error)}; {until}")


def _remedy(error: MasterError) -> str:
    """What to look at."""
    cause = error.__cause__
    if isinstance(error, AccessDenied):
        return "give master_token_file the master's token, and master_client_cert where it wants a certificate"
    if isinstance(cause, ConfigError):
        return "correct master_tls_ca, master_client_cert or master_client_key"
    if isinstance(cause, ImportError):
        return "install what is missing, or give an address that begins with umbp://"
    if isinstance(cause, ssl.SSLError):
        return "look whether the master has TLS, and whether master_tls_ca is who signed its certificate"
    return "look whether `umbp master` is running there"


def _ask(dialer: Dialer, address: MasterAddress) -> str:
    """What the master at ``address`` says.  Raises ``MasterError``."""
    transport = dialer(address, TIMEOUT_S)
    try:
        began = time.perf_counter()
        transport.match([], False, TIMEOUT_S)
        text = f"{address} answers in {(time.perf_counter() - began) * 1000:.1f} ms"
        if not is_native(transport):
            return f"{text} (UMBP's gRPC)"
        alive = sum(node.status is NodeStatus.ALIVE for node in transport.list_nodes(TIMEOUT_S))
        return f"{text} (native protocol), {alive} living node(s)"
    finally:
        transport.close()
