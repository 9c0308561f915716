"""One daemon as a process: its signals, its log, and the one sentence when it cannot start."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from pathlib import Path

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.keeper import PoolKeeper
from umbp_connectors.daemon.launch import READY
from umbp_connectors.daemon.server import DaemonEnding, DaemonServer
from umbp_connectors.daemon.settings import idle_exit_s, served_door
from umbp_connectors.logs import log_to_stderr
from umbp_connectors.plugins import create_manager
from umbp_connectors.pool import machine
from umbp_connectors.pool.folder import try_folder
from umbp_connectors.pool.local import CLOSE_TIMEOUT_S
from umbp_core.errors import ConfigError, TierUnavailable

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PREDECESSOR_S = 60.0
"""How long a start waits for the last daemon at its path to end: longer than closing pools takes, see ``LocalPool``."""
_NEVER_S = 86_400.0
"""How often it looks when there is nothing to look for."""
_RETRY_S = 0.1


def serve(config: UmbpConfig, path: Path) -> None:
    """Be the daemon at ``path`` until a signal comes, or until nobody used it for as long as ``config`` says.

    One that is ending there is waited for: its SSD folder is free then.  The first signal ends it gracefully: calls
    under way come to their end, what is in DRAM only goes to SSD.  A second one ends it at once.  Prints one line to
    standard output when it can be reached.  The main thread only.  Raises ``UmbpError`` with one sentence when it
    cannot start.
    """
    door = served_door(config)
    log_to_stderr(config.log_level)
    limits = machine.memory_limits()
    if config.dram_capacity > limits.usable:
        raise ConfigError(
            f"a DRAM tier of {config.dram_capacity / 2**30:.1f} GiB does not fit this machine, which has "
            f"{limits.describe()}; set a smaller dram_capacity"
        )
    # Taken by sigtimedwait alone, whichever thread they come to.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    plugins = create_manager(config)
    keeper = PoolKeeper(config, plugins.eviction_maker(), plugins.ssd_gate_maker(), plugins.make_ssd_tier)
    server = DaemonServer(keeper, path, door=door)
    with contextlib.ExitStack() as ending:
        ending.callback(logger.info, "umbp: the daemon has ended")
        ending.callback(server.close, 0.0)  # not before the pools are closed: the next daemon wants their folders
        ending.callback(keeper.close, CLOSE_TIMEOUT_S)
        why = _open(server, path)
        if why:
            logger.info("umbp: %s: the daemon does not start", why)
            return
        ending.callback(server.stop, 0.0)
        metrics = _open_metrics(config, keeper, server, ending)
        tcp = f", tcp://{server.endpoint}" if server.endpoint is not None else ""
        sys.stdout.write(f"{READY}: {path}{tcp}, {_tiers(config)}{metrics}\n")
        sys.stdout.flush()
        why = _until_over(server, idle_exit_s(config))
        logger.info("umbp: %s: the daemon stops", why)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        server.stop()


def _open(server: DaemonServer, path: Path) -> str:
    """Listen, once the last daemon at ``path`` has ended; the signal that came before that, if one did."""
    deadline = 0.0
    while True:
        try:
            server.open()
            return ""
        except DaemonEnding:
            now = time.monotonic()
            if not deadline:
                deadline = now + PREDECESSOR_S
                logger.info("umbp: waiting for the last daemon at %s, which is closing its pools", path)
            elif now >= deadline:
                raise
        if (got := signal.sigtimedwait(SIGNALS, _RETRY_S)) is not None:
            return signal.Signals(got.si_signo).name


def _open_metrics(config: UmbpConfig, keeper: PoolKeeper, server: DaemonServer, ending: contextlib.ExitStack) -> str:
    """Serve metrics if that is wanted; what the line that says so adds."""
    if not config.daemon_metrics_listen:
        return ""
    from umbp_connectors.daemon.metrics import MetricsDoor

    door = MetricsDoor(config.daemon_metrics_listen, keeper, server)
    door.open()
    ending.callback(door.close)
    return f", metrics at {door.address}"


def _until_over(server: DaemonServer, idle_exit: float) -> str:
    """Wait for a signal, or until there was no client for ``idle_exit`` seconds (0: never); which it was."""
    wait = idle_exit or _NEVER_S
    while (got := signal.sigtimedwait(SIGNALS, max(0.0, wait))) is None:
        if idle_exit:
            wait = idle_exit - server.idle_s
            if wait <= 0:
                return f"no client for {idle_exit:g} seconds"
    return signal.Signals(got.si_signo).name


def _tiers(config: UmbpConfig) -> str:
    return f"DRAM {config.dram_capacity / 2**30:.2f} GiB, {_ssd(config)}"


def _ssd(config: UmbpConfig) -> str:
    """What there is of the SSD tier.  A folder that cannot be used costs one warning, as it does with every pool."""
    if config.ssd_dir is None or not config.ssd_active:
        return "no SSD"
    try:
        try_folder(config.ssd_dir)
    except TierUnavailable as error:
        logger.warning("the SSD tier is off: %s", error)
        return "no SSD"
    return f"SSD {config.ssd_capacity / 2**30:.2f} GiB in {config.ssd_dir}"
