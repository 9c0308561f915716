"""Whether the host's daemon that is configured answers, lets us in, and has memory that this process can map."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.doors import TcpDoor
from umbp_connectors.daemon.link import inspect
from umbp_connectors.daemon.settings import door_of
from umbp_connectors.doctor.findings import Finding, Status
from umbp_core.errors import AccessDenied, ConfigError, UmbpError

TIMEOUT_S = 3.0


def reached(config: UmbpConfig) -> Iterator[Finding]:
    """One finding where ``config`` wants a daemon.  Starts none."""
    if config.mode != "daemon":
        return
    try:
        door = door_of(config)
    except ConfigError as error:
        yield Finding("daemon", Status.PROBLEM, str(error), "correct the keys named here; the engine will not start")
        return
    try:
        overview = inspect(door, time.monotonic() + TIMEOUT_S)
    except AccessDenied as error:
        yield Finding(
            "daemon", Status.PROBLEM, f"{door}: {error}", "both sides need the same token; see docs/daemon.md"
        )
    except (OSError, UmbpError) as error:
        if config.daemon_auto_start:
            yield Finding("daemon", Status.OK, f"none at {door} yet; an engine starts it")
        else:
            advice = "start `umbp daemon`, or set daemon_auto_start; until then every block is a miss"
            yield Finding("daemon", Status.WARNING, f"none answers at {door}: {error}", advice)
    else:
        yield _mapped(door, overview.pid) or Finding("daemon", Status.OK, f"{len(overview.pools)} pool(s) at {door}")


def _mapped(door: object, pid: int) -> Finding | None:
    """What keeps this process from mapping the memory of process ``pid``, if something does."""
    if not isinstance(door, TcpDoor):
        return None
    try:
        Path(f"/proc/{pid}/exe").readlink()  # the system allows it to those who may open the process's memory, too
    except OSError as error:
        return Finding(
            "daemon",
            Status.PROBLEM,
            f"{door} answers, and the memory of process {pid} cannot be opened here ({error.strerror})",
            "run as the daemon's user and in its PID namespace (docker run --pid=host), or use daemon_socket",
        )
    return None
