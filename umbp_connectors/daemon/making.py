"""Pools for the configured mode: in this process, or in the host's daemon."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.client import DaemonClientConfig, DaemonPool
from umbp_connectors.daemon.launch import Launcher
from umbp_connectors.daemon.settings import door_of, socket_path
from umbp_connectors.pool.local import LocalPool, LocalPoolConfig
from umbp_core.errors import ConfigError
from umbp_core.ids import Identity


def daemon_pool(config: UmbpConfig, identity: Identity, wanted: LocalPoolConfig) -> DaemonPool:
    """A client, not open yet, of the daemon that ``config`` names, for a pool as ``wanted`` describes it.

    Whether and where there is an SSD tier, and how objects are evicted, is the daemon's own configuration.  Raises
    ``ConfigError`` when the way to it cannot be used.
    """
    settings = DaemonClientConfig(
        door_of(config),
        wanted.object_bytes,
        wanted.dram_bytes,
        rank=wanted.rank,
        ranks=wanted.ranks,
        ssd_share=wanted.ssd_share,
        timeout_s=config.call_timeout_ms / 1000,
        copy_threads=wanted.copy_threads,
        prefault=wanted.prefault,
        label=f"{Path(sys.argv[0] or 'python').name} {os.getpid()}",
        start_timeout_s=config.daemon_start_timeout_s,
    )
    return DaemonPool(identity, settings, Launcher(socket_path(config), config) if config.daemon_auto_start else None)


_MAKERS: dict[str, Callable[[UmbpConfig, Identity, LocalPoolConfig], LocalPool | DaemonPool]] = {
    "local": lambda config, identity, wanted: LocalPool(identity, wanted),
    "daemon": daemon_pool,
}


def pool_maker(config: UmbpConfig) -> Callable[[Identity, LocalPoolConfig], LocalPool | DaemonPool]:
    """Makes pools, not open yet, for ``config.mode``.  Raises ``ConfigError``, here and now, when nobody does."""
    make = _MAKERS.get(config.mode)
    if make is None:
        raise ConfigError(f"mode {config.mode!r} has no pool of this kind; set mode to one of {', '.join(_MAKERS)}")
    if config.mode == "daemon":
        door_of(config)
    return lambda identity, wanted: make(config, identity, wanted)
