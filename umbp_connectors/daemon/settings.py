"""Where the daemon of a host is, and what it may use."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.doors import Door, TcpDoor, loopback_endpoint
from umbp_connectors.master.security import checked_token, read_token
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
    "dram_high_watermark",
    "dram_low_watermark",
    "ssd_high_watermark",
    "ssd_low_watermark",
    "io_threads",
    "daemon_quota",
    "daemon_idle_exit_s",
    "plugins",
    "log_level",
)
"""Keys that a daemon reads; one that an engine starts gets the engine's values."""


def door_of(config: UmbpConfig) -> Door:
    """Where a client reaches its daemon.  Raises ``ConfigError`` when that cannot be used, or has no token."""
    if not config.daemon_address:
        return socket_path(config)
    if config.daemon_auto_start:
        raise ConfigError(
            "daemon_auto_start starts a daemon at its Unix socket, and daemon_address is a port; leave one of them out"
        )
    return TcpDoor(loopback_endpoint(config.daemon_address), _token(config, "daemon_address"))


def served_door(config: UmbpConfig) -> TcpDoor | None:
    """Where a daemon serves besides its Unix socket, if it does.  Raises ``ConfigError`` when it has no token."""
    if not config.daemon_listen:
        return None
    return TcpDoor(loopback_endpoint(config.daemon_listen), _token(config, "daemon_listen"))


def _token(config: UmbpConfig, why: str) -> bytes:
    path = config.daemon_token_file
    if path is None:
        if config.daemon_token:
            return checked_token(config.daemon_token.encode(), "daemon_token")
        raise ConfigError(f"{why} needs a token, as every user of this host reaches the port; set daemon_token_file")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"daemon_token_file {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"daemon_token_file {path} can be read by others, so it is no secret; chmod 600 it")
    return read_token(path)


def socket_path(config: UmbpConfig) -> Path:
    """The daemon's Unix socket.  Raises ``ConfigError`` when the system does not take so long a path."""
    path = config.daemon_socket or Path(tempfile.gettempdir()) / f"umbp-{os.geteuid()}" / "daemon.sock"
    if len(os.fsencode(path)) > _MAX_PATH:
        raise ConfigError(
            f"the path {path} of the daemon's socket is longer than {_MAX_PATH} bytes; give a shorter daemon_socket"
        )
    return path


def idle_exit_s(config: UmbpConfig, started_by_engine: bool = False) -> float:
    """After how many seconds without clients the daemon ends; 0 is never."""
    if config.daemon_idle_exit_s is not None:
        return config.daemon_idle_exit_s
    return STARTED_BY_ENGINE_IDLE_S if started_by_engine else 0.0
