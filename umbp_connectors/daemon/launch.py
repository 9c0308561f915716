"""Starts a daemon where none is: one, however many engines want it at the same moment."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.settings import DAEMON_KEYS, idle_exit_s
from umbp_connectors.pool.locks import FolderLock
from umbp_core.errors import TierUnavailable

logger = logging.getLogger(__name__)

READY = "umbp daemon ready"
"""How the one line begins that a daemon prints when it can be reached."""
_PROGRAM = "from umbp_connectors.cli import main; main()"


class Launcher:
    """Starts ``umbp daemon`` at ``path`` with the values that ``config`` has for it.  Any thread.

    The daemon has a session of its own and outlives the engine.  What it logs goes to a file beside its socket.
    """

    def __init__(self, path: Path, config: UmbpConfig) -> None:
        self._path = path
        self._timeout = config.daemon_start_timeout_s
        self._settings = _settings(config)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, timeout: float) -> bool:
        """Start a daemon, unless one listens or somebody starts one; wait for it.  Whether it can be reached now."""
        deadline = time.monotonic() + timeout
        lock = FolderLock(self._path.parent, f"{self._path.name}.start")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Whoever holds it either gives it back within its own time for a start, or dies and the system does.
            lock.acquire(wait=True)
        except (OSError, TierUnavailable) as error:
            logger.warning("umbp: no daemon can be started: %s", error)
            return False
        try:
            return listens(self._path) or self._launch(deadline)
        finally:
            lock.release()

    def start_soon(self) -> None:
        """:meth:`start` in a thread, unless one does so already."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self.start, args=(self._timeout,), name="umbp-daemon-start", daemon=True
                )
                self._thread.start()

    def _launch(self, deadline: float) -> bool:
        log_path = self._path.with_name(f"{self._path.name}.log")
        command = [sys.executable, "-c", _PROGRAM, "daemon", "--socket", str(self._path)]
        for key, value in self._settings.items():
            command += ["--set", f"{key}={value}"]
        try:
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            logger.warning("umbp: no daemon can be started: %s cannot be written: %s", log_path, error.strerror)
            return False
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        except OSError as error:
            logger.warning("umbp: no daemon can be started: %s", error)
            return False
        finally:
            os.close(log)
        with process.stdout or contextlib.nullcontext() as output:
            line = _first_line(output, deadline) if output is not None else b""
        if line.startswith(READY.encode()):
            logger.info("umbp: started a daemon (process %d) at %s", process.pid, self._path)
            _leave(process)
            return True
        process.kill()
        process.wait()
        logger.warning("umbp: the daemon did not start in time or could not; %s says why", log_path)
        return False


def listens(path: Path) -> bool:
    """Whether somebody listens at the Unix socket ``path``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except TimeoutError:  # it does, and is busy
            return True
        except OSError:
            return False
    return True


def _settings(config: UmbpConfig) -> Mapping[str, str]:
    """The values of a daemon that this engine starts, as text."""
    values = config.model_dump(mode="json", include=set(DAEMON_KEYS))
    values["daemon_idle_exit_s"] = idle_exit_s(config, started_by_engine=True)
    values = {key: ",".join(value) if isinstance(value, list) else value for key, value in values.items()}
    return {key: str(value) for key, value in values.items() if value not in (None, "")}


def _first_line(output: IO[bytes], deadline: float) -> bytes:
    """What the process prints first, if it does so in time."""
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                break
            piece = os.read(output.fileno(), 4096)
            if not piece:
                break
            line += piece
    return line


def _leave(process: subprocess.Popen[bytes]) -> None:
    """Let the process be: a thread waits for its end, whenever that is, so that it does not stay as a zombie."""
    threading.Thread(target=process.wait, name="umbp-daemon-wait", daemon=True).start()
