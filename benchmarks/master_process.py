"""A master as a process of its own, and clients of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from umbp_connectors.client.grpc_transport import GrpcTransport
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_core.master.model import Registration
from umbp_core.master.transport import MasterTransport

COMMAND = (sys.executable, "-m", "umbp_connectors.master")
TIMEOUT = 60.0
BATCH = 2048
_ENVIRONMENT = {
    "UMBP_MASTER_LISTEN": "127.0.0.1:0",
    "UMBP_MASTER_NATIVE_LISTEN": "127.0.0.1:0",
    "UMBP_MASTER_METRICS_LISTEN": "none",
    "UMBP_MASTER_STATE_DIR": "none",
    # Nodes of a benchmark send no heartbeats.
    "UMBP_HEARTBEAT_TTL_SEC": "3600",
    "UMBP_LOG_LEVEL": "warning",
}


@dataclass(frozen=True, slots=True)
class Master:
    """A master that is ready."""

    pid: int
    unix: str
    tcp: tuple[str, int]
    grpc: str

    def native(self, address: str | tuple[str, int] = "") -> NativeBlockingClient:
        """A client over the Unix socket, or at ``address``."""
        client = NativeBlockingClient(address or self.unix)
        client.open(TIMEOUT)
        return client

    def doors(self) -> dict[str, MasterTransport]:
        """A client per way to reach it."""
        return {
            "native": self.native(),
            "native, TCP": self.native(self.tcp),
            "gRPC": GrpcTransport.connect(self.grpc, TIMEOUT),
        }

    def resident(self) -> int:
        """Bytes of its process that are in memory (Linux)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def processor(self) -> float:
        """Seconds of a processor that it has used (Linux)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def master(command: Sequence[str] = COMMAND) -> Iterator[Master]:
    """Start a master, and stop it in the end."""
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "master.sock"
        environment = os.environ | _ENVIRONMENT | {"UMBP_MASTER_NATIVE_SOCKET": str(socket)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            doors = _announced(process)
            host, _, port = doors["native"].rpartition(":")
            yield Master(process.pid, str(socket), (host, int(port)), doors["grpc"])
        finally:
            process.terminate()
            process.wait(TIMEOUT)
            if process.stdout is not None:
                process.stdout.close()


def _announced(process: subprocess.Popen[str]) -> dict[str, str]:
    """Where the master can be reached, from its line that says that it is ready."""
    for line in process.stdout or ():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "native" in words and "grpc" in words:
            return words
    raise SystemExit(f"the master ended with {process.wait(TIMEOUT)} before it was ready")


def hashes(count: int, start: int = 0) -> list[bytes]:
    """Hashes as a router writes them: decimal, 19 digits, scattered."""
    return [b"%019d" % ((start + number) * 6364136223846793005 % 10**19) for number in range(count)]


def register(client: MasterTransport, *nodes: str) -> None:
    """Introduce nodes."""
    for node in nodes:
        client.register(Registration(node, node_address="127.0.0.1", peer_address="127.0.0.1:1"), TIMEOUT)


def report(client: MasterTransport, node: str, keys: Sequence[bytes], tier: int, size: int = BATCH) -> float:
    """Report ``keys`` in batches; returns blocks a second."""
    start = time.perf_counter()
    for first in range(0, len(keys), size):
        client.report(node, keys[first : first + size], tier, TIMEOUT)
    return len(keys) / (time.perf_counter() - start)
