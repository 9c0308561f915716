"""A real ``umbp master`` for tests: started, waited for by its ready line, stopped or killed."""

from __future__ import annotations

import http.client
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from umbp_connectors.client.native_blocking import NativeBlockingClient

if TYPE_CHECKING:
    from umbp_connectors.client.grpc_transport import GrpcTransport

ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 60.0
"""Seconds for anything that a process does; it takes far less on an idle machine."""
CALL = 60.0

UMBP = "from umbp_connectors.cli import main; main()"
POSITIONAL = "from umbp_connectors.cli_master import main; main()"
ANY_PORT = "127.0.0.1:0"


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """An environment without variables of ours and with its own home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UMBP_", "XDG_"))}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "core")))
    return kept | {"PYTHONPATH": paths, "HOME": str(folder), "COLUMNS": "200", "NO_COLOR": "1"} | variables


def umbp(folder: Path, *arguments: str, code: str = UMBP, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(folder, **variables),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


@contextmanager
def running_umbp(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that does not end by itself, killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", UMBP, *arguments],
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


class MasterProcess:
    """``umbp master`` with ``arguments``; ports are free ones unless they are given.  A context manager."""

    def __init__(self, folder: Path, *arguments: str, code: str = UMBP, plain: bool = False, **variables: str) -> None:
        given = {argument for argument in arguments if argument.startswith("--")}
        listen = [f"--{name}={ANY_PORT}" for name in ("listen", "native-listen", "metrics-listen")]
        defaults = [] if plain else ["master", *(text for text in listen if text.partition("=")[0] not in given)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *defaults, *arguments],
            env=environment(folder, **variables),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._log: list[str] = []
        self._logged = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read_lines, args=(self.process.stdout,), daemon=True),
            threading.Thread(target=self._read_log, args=(self.process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self.doors: dict[str, str] = {}

    def __enter__(self) -> MasterProcess:
        line = self._lines.get(timeout=DEADLINE)
        if line is None:
            self.process.wait(DEADLINE)
            raise AssertionError(f"the master ended with {self.process.returncode}: {self.log}")
        assert line.startswith("umbp master ready: "), line
        self.doors = dict(pair.split("=", 1) for pair in line.removeprefix("umbp master ready: ").split())
        return self

    def __exit__(self, *exception: object) -> None:
        self.end(signal.SIGKILL)

    @property
    def log(self) -> str:
        """What it wrote to standard error up to now."""
        return "".join(self._log)

    def says(self, text: str) -> bool:
        """Whether it writes ``text`` to standard error, which may reach us later than what it does."""
        with self._logged:
            return self._logged.wait_for(lambda: text in self.log, DEADLINE)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and wait for the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(DEADLINE)
        for reader in self._readers:
            reader.join(DEADLINE)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code

    def native(self) -> NativeBlockingClient:
        """A client of its TCP door."""
        host, _, port = self.doors["native"].rpartition(":")
        return NativeBlockingClient((host, int(port)))

    def grpc(self, address: str = "") -> GrpcTransport:
        """A client of its gRPC door; needs the packages of the extra ``grpc``."""
        from umbp_connectors.client.grpc_transport import GrpcTransport

        return GrpcTransport.connect(address or self.doors["grpc"], CALL)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page."""
        host, _, port = self.doors["metrics"].rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=CALL)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _read_lines(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def _read_log(self, stream: IO[str]) -> None:
        for line in stream:
            with self._logged:
                self._log.append(line)
                self._logged.notify_all()
