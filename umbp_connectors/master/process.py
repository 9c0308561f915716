"""One master as a process: its loop, its signals, its log, and the one sentence when it cannot start."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping

from umbp_connectors.logs import log_to_stderr
from umbp_connectors.master.app import Doors, MasterApp
from umbp_connectors.master.settings import MasterConfig

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SWITCH_SECONDS = 0.0005
"""A tenth of the usual; the calls of a master take tens of microseconds."""


def serve(config: MasterConfig, env: Mapping[str, str]) -> None:
    """Be a master until a signal comes: the first ends it gracefully, a second at once.

    Prints one line to standard output when it can be reached.  The main thread only.  Raises ``UmbpError`` with one
    sentence when it cannot start.
    """
    log_to_stderr(config.log_level)
    # The loop gets the interpreter back this soon from the threads that render metrics or write to the store.
    sys.setswitchinterval(SWITCH_SECONDS)
    loop = _new_loop()()
    try:
        loop.run_until_complete(_until_signalled(MasterApp(config, env)))
    finally:
        _finish(loop)


def _new_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """That of uvloop where it is installed: it is twice as fast."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    new: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return new


async def _until_signalled(app: MasterApp) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled(number: int) -> None:
        logger.info("umbp: %s: the master stops", signal.Signals(number).name)
        for each in SIGNALS:
            loop.remove_signal_handler(each)
        stop.set()

    for each in SIGNALS:
        loop.add_signal_handler(each, signalled, each)
    await app.run(stop, _announce)


def _announce(doors: Doors) -> None:
    sys.stdout.write(f"umbp master ready: {doors}\n")
    sys.stdout.flush()


def _finish(loop: asyncio.AbstractEventLoop) -> None:
    """End a loop as ``asyncio.run`` does, which takes no loop of others before Python 3.12."""
    leftovers: tuple[Coroutine[object, object, None], ...] = (
        loop.shutdown_asyncgens(),
        loop.shutdown_default_executor(),
    )
    for leftover in leftovers:
        loop.run_until_complete(leftover)
    loop.close()
