"""Where the daemon of a host is, and what it may use."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from umbp_connectors.config_model import UmbpConfig
from umbp_core.errors import ConfigError

_MAX_PATH = 107
"""Bytes of the path of a Unix socket."""
STARTED_BY_ENGINE_IDLE_S = 1800.0
"""When a daemon that an engine started ends without clients, unless the configuration says otherwise."""

DAEMON_KEYS = (
    "dram_capacity",
    "dram_use_hugepages",
    "dram_numa_node",
    "dram_prefault",
    "ssd_dir",
    "ssd_enabled",
    "ssd_capacity",
    "ssd_engines",
    "ssd_direct_io",
    "ssd_durability",
    "ssd_offload_policy",
    "offload_min_sightings",
    "offload_window_s",
    "offload_min_priority",
    "eviction_policy",
    "io_threads",
    "daemon_quota",
    "daemon_idle_exit_s",
    "plugins",
    "log_level",
)
"""Keys that a daemon reads; one that an engine starts gets the engine's values."""


def socket_path(config: UmbpConfig) -> Path:
    """The daemon's socket.  Raises ``ConfigError`` when the system does not take so long a path."""
    path = config.daemon_socket or Path(tempfile.gettempdir()) / f"umbp-{os.geteuid()}" / "daemon.sock"
    if len(os.fsencode(path)) > _MAX_PATH:
        raise ConfigError(
            f"the path {path} of the daemon's socket is longer than {_MAX_PATH} bytes; give a shorter daemon_socket"
        )
    return path


def check_supported(config: UmbpConfig) -> None:
    """Raises ``ConfigError`` when a daemon cannot do what ``config`` asks for."""
    if config.ssd_durability == "strict":
        raise ConfigError(
            "ssd_durability 'strict' is not for a daemon yet, which answers a put before the disk does; "
            "set 'batched', or mode 'local'"
        )


def idle_exit_s(config: UmbpConfig, started_by_engine: bool = False) -> float:
    """After how many seconds without clients the daemon ends; 0 is never."""
    if config.daemon_idle_exit_s is not None:
        return config.daemon_idle_exit_s
    return STARTED_BY_ENGINE_IDLE_S if started_by_engine else 0.0
