"""Makes the client that a configuration asks for."""

from __future__ import annotations

import contextlib
import os
import socket

from umbp_connectors.config import resolve
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.hookspecs import ClientSpec
from umbp_connectors.plugins import PluginHost, create_manager
from umbp_connectors.pool.umbp_client import Client, ExternalKv
from umbp_core.ids import Identity
from umbp_core.outcomes import DeploymentMode


def create_client(
    config: UmbpConfig | None = None,
    *,
    identity: Identity,
    object_bytes: int,
    rank: int = 0,
    ranks: int = 1,
    plugins: PluginHost | None = None,
    external: ExternalKv | None = None,
) -> Client:
    """A client for objects of at most ``object_bytes`` of ``identity``, open; the caller closes it.

    ``config`` (by default that of the environment and its file) says which mode; ``plugins``, by default what is
    installed, make the pool (``umbp_make_client``).  ``external`` is what :func:`open_external` gives, which is done
    here when it is not given.  Raises ``UmbpError``.
    """
    config = config or resolve().config
    host = plugins or create_manager(config)
    pool = host.make_client(ClientSpec(identity, object_bytes, rank, ranks))
    with contextlib.ExitStack() as undo:
        undo.callback(pool.close)
        external = external or open_external(config)
        undo.pop_all()
    return Client(pool, DeploymentMode(config.mode), external)


def open_external(config: UmbpConfig) -> ExternalKv:
    """A line to the master of ``config`` for external KV; without a ``master_address`` it does nothing.

    The node's name is ``node_id``, or the host's with the process id.  Raises ``ConfigError``.
    """
    external = ExternalKv()
    if not config.report or not config.master_address:
        return external
    from umbp_connectors.client.master_client import MasterClient
    from umbp_connectors.reporting.opening import dialer_of
    from umbp_core.master.model import Registration

    host = socket.gethostname()
    node_id = config.node_id or f"{host}:pid{os.getpid()}"
    registration = Registration(node_id, config.node_address or host, tags=config.node_tags)
    line = MasterClient(
        config.master_address, registration, snapshot=external.snapshot, dial=dialer_of(config, node_id)
    )
    external.connect(line)
    line.start()
    return external
