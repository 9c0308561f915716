"""A reporter made from the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from umbp_connectors.config_model import UmbpConfig

if TYPE_CHECKING:
    from umbp_connectors.client.dial import Dialer
    from umbp_connectors.reporting.node import NodeFacts
    from umbp_connectors.reporting.reporter import Reporter

_FLUSH_INTERVAL = 0.0
"""The client waits for no more words: the reporter has gathered them already."""


def dialer_of(config: UmbpConfig, node_id: str = "", role: str = "node") -> Dialer:
    """Connects to the master as ``config`` says.  Raises ``ConfigError`` when the token cannot be used."""
    from umbp_connectors.client.dial import ClientTls, Dialer
    from umbp_connectors.master.security import checked_token, read_token

    token = b""
    if config.master_token_file is not None:
        token = read_token(config.master_token_file)
    elif config.master_token:
        token = checked_token(config.master_token.encode(), "master_token")
    files = (config.master_tls_ca, config.master_client_cert, config.master_client_key)
    return Dialer(token.decode(), ClientTls(*files) if any(files) else None, node_id, role)


def open_reporter(config: UmbpConfig, facts: NodeFacts) -> Reporter | None:
    """The reporter of the node that ``facts`` describe, not started; ``None`` without a master, or with ``report`` off.

    Raises ``ConfigError`` when the token cannot be used.
    """
    if not config.report or not config.master_address:
        return None
    from umbp_connectors.client.master_client import MasterClient
    from umbp_connectors.client.settings import ClientSettings
    from umbp_connectors.reporting.mirror import Mirror
    from umbp_connectors.reporting.node import registration_of
    from umbp_connectors.reporting.reporter import Reporter

    mirror = Mirror()
    registration = registration_of(facts, config)
    client = MasterClient(
        config.master_address,
        registration,
        snapshot=mirror.snapshot,
        settings=ClientSettings(flush_interval=_FLUSH_INTERVAL),
        dial=dialer_of(config, registration.node_id),
    )
    return Reporter(client, mirror, config.report_interval_ms / 1000)
