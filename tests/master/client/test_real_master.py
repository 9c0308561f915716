"""Clients and a real master process: both doors, a kill, a stop, a master without a native door (laws L5 and L11)."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.connectors.waiting import PATIENCE, eventually
from tests.master.app.master_process import MasterProcess, environment
from umbp_connectors.client.dial import ClientTls, Dialer
from umbp_connectors.client.master_client import MasterClient
from umbp_connectors.client.settings import ClientSettings
from umbp_core.journal import Delta
from umbp_core.master.model import Registration, TierCapacity

CERTS = Path(__file__).resolve().parents[1] / "certs"
HBM, DRAM, SSD = 1, 2, 3
INTERVAL = 1.0
"""Seconds between heartbeats of the masters here."""
SLACK = 30.0
"""What a busy machine may add to two of them, and to what nobody waits for."""
FAST = {"UMBP_HEARTBEAT_TTL_SEC": "2"}
HASTY = ClientSettings(connect_timeout=0.5)
SETTINGS = ClientSettings(upgrade_interval=0.2, connect_timeout=PATIENCE, call_timeout=PATIENCE)


class Engine:
    """A node with content that does not change, whatever happens to its master."""

    def __init__(
        self,
        name: str,
        address: str,
        hashes: int = 3000,
        dialer: Dialer | None = None,
        settings: ClientSettings = SETTINGS,
    ) -> None:
        self.name = name
        self.held = {
            HBM: [b"%s-%d" % (name.encode(), number) for number in range(hashes)],
            SSD: [b"%s-%d" % (name.encode(), number) for number in range(0, hashes, 2)],
        }
        self.owned = [Delta(b"%s-own-%d" % (name.encode(), number), DRAM, 10) for number in range(hashes)]
        self.client = MasterClient(
            address,
            Registration(name, "127.0.0.1", f"127.0.0.1:{name}", tags=("role=test",)),
            snapshot=lambda: self.held.items(),
            blocks=lambda: self.owned,
            settings=settings,
            dial=dialer,
        )
        self.client.set_capacities([TierCapacity(DRAM, 1 << 30, 1 << 29)])
        self.client.start()

    def known(self, asker: MasterClient) -> bool:
        """Whether the master knows all of it, and where the node can be reached."""
        found = {match.node_id: match for match in asker.match(self.held[HBM], timeout=PATIENCE)}.get(self.name)
        if found is None or found.peer_address != f"127.0.0.1:{self.name}" or found.tiers != self.held:
            return False
        routes = asker.route_get([delta.key for delta in self.owned], timeout=PATIENCE)
        return all(route is not None and route.node_id == self.name and route.peer_address for route in routes)


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def engine_of(cleanup: ExitStack, name: str, address: str, **options: object) -> Engine:
    engine = Engine(name, address, **options)  # type: ignore[arg-type]
    cleanup.enter_context(closing(engine.client))
    return engine


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MasterProcess]:
    folder = tmp_path_factory.mktemp("master")
    with MasterProcess(folder, f"--native-socket={folder / 'm.sock'}", **FAST) as running:
        yield running


@pytest.mark.parametrize(
    ("address", "wire"),
    [
        ("umbp://{native}", "umbp://{native}"),
        ("umbp+unix://{socket}", "umbp+unix://{socket}"),
        ("grpc://{grpc}", "grpc://{grpc}"),
        ("{native}", "umbp://{native}"),
        ("{grpc}", "grpc://{grpc}"),
    ],
)
def test_every_door_takes_everything(cleanup: ExitStack, master: MasterProcess, address: str, wire: str) -> None:
    engine = engine_of(cleanup, "one", address.format(**master.doors))
    client = engine.client
    assert client.flush(PATIENCE)
    assert client.stats().address == wire.format(**master.doors)
    assert engine.known(client)
    engine.held[HBM].pop()
    client.revoke([b"one-2999"], HBM)
    client.clear(SSD)
    del engine.held[SSD]
    assert client.flush(PATIENCE)
    assert engine.known(client)
    assert [match.length for match in client.match_prefix([b"one-0", b"one-1", b"none"], timeout=PATIENCE)] == [2]
    assert client.stats().degraded == 0
    assert client.close()
    observer = engine_of(cleanup, "observer", address.format(**master.doors), hashes=0).client
    assert observer.flush(PATIENCE)
    assert observer.match([b"one-0"], timeout=PATIENCE) == []
    assert observer.stats().degraded == 0


def kept(folder: Path) -> int:
    """Nodes in the table of a master that runs."""
    with closing(sqlite3.connect(f"file:{folder / 'nodes.sqlite'}?mode=ro", uri=True)) as table:
        return int(table.execute("SELECT count(*) FROM nodes").fetchone()[0])


@pytest.mark.parametrize("memory", ["embedded", "none"])
@pytest.mark.parametrize("door", ["umbp://{native}", "grpc://{grpc}"])
def test_after_a_kill_and_a_restart_all_is_known_within_two_heartbeats(
    cleanup: ExitStack, tmp_path: Path, door: str, memory: str
) -> None:
    options = [f"--state-dir={tmp_path / 'state'}", f"--metadata-backend={memory}"]
    first = cleanup.enter_context(MasterProcess(tmp_path, *options, **FAST))
    ports = [f"--listen={first.doors['grpc']}", f"--native-listen={first.doors['native']}"]
    address = door.format(**first.doors)
    engines = [engine_of(cleanup, name, address) for name in ("one", "two")]
    asker = engines[0].client
    assert all(engine.client.flush(PATIENCE) and engine.known(asker) for engine in engines)
    assert memory == "none" or eventually(lambda: kept(tmp_path / "state") == len(engines))

    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    began = time.monotonic()
    engines[1].client.report([b"two-later"], HBM)
    engines[1].held[HBM].append(b"two-later")
    assert asker.match([b"one-0"]) == []
    assert time.monotonic() - began < SLACK

    second = cleanup.enter_context(MasterProcess(tmp_path, *options, *ports, **FAST))
    assert second.doors["nodes"] == ("2" if memory == "embedded" else "0")
    assert eventually(lambda: all(engine.known(asker) for engine in engines), 2 * INTERVAL + SLACK)
    assert eventually(lambda: all(engine.client.stats().full_syncs >= 2 for engine in engines))


def test_a_stopped_master_makes_nobody_wait_and_goes_on_where_it_was(cleanup: ExitStack, tmp_path: Path) -> None:
    process = cleanup.enter_context(MasterProcess(tmp_path, **FAST))
    engine = engine_of(cleanup, "one", f"umbp://{process.doors['native']}")
    client = engine.client
    assert client.flush(PATIENCE)
    process.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        client.report([b"one-later"], HBM)
        assert client.match([b"one-0"], timeout=0.2) == []
        assert time.monotonic() - began < 0.2 + SLACK
        engine.held[HBM].append(b"one-later")
    finally:
        process.process.send_signal(signal.SIGCONT)
    assert eventually(lambda: engine.known(client))


CLIENT = """
import sys
from umbp_connectors.client.master_client import MasterClient
from umbp_core.master.model import Registration
held = [(1, [b"a", b"b"]), (3, [b"a"])]
client = MasterClient(sys.argv[1], Registration("paused", peer_address="paused:1"), snapshot=lambda: held)
client.start()
print("told" if client.flush(60.0) else "not told", flush=True)
sys.stdin.read()
client.close()
"""


@pytest.mark.parametrize("door", ["umbp://{native}", "grpc://{grpc}"])
def test_a_client_that_was_stopped_beyond_its_expiry_is_known_again(
    cleanup: ExitStack, tmp_path: Path, door: str
) -> None:
    brief = {"UMBP_HEARTBEAT_TTL_SEC": "1", "UMBP_MAX_MISSED_HEARTBEATS": "1", "UMBP_REAPER_INTERVAL_SEC": "0.2"}
    process = cleanup.enter_context(MasterProcess(tmp_path, **brief))
    observer = engine_of(cleanup, "observer", f"umbp://{process.doors['native']}", hashes=0).client
    assert observer.flush(PATIENCE)
    engine = subprocess.Popen(
        [sys.executable, "-c", CLIENT, door.format(**process.doors)],
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def known() -> bool:
        matches = observer.match([b"a", b"b"], timeout=PATIENCE)
        return [(match.peer_address, match.tiers) for match in matches] == [("paused:1", {1: [b"a", b"b"], 3: [b"a"]})]

    try:
        assert engine.stdout is not None
        assert engine.stdout.readline() == "told\n"
        assert eventually(known)
        engine.send_signal(signal.SIGSTOP)
        assert eventually(lambda: observer.match([b"a", b"b"], timeout=PATIENCE) == [])
        engine.send_signal(signal.SIGCONT)
        assert eventually(known, 2 * 0.5 + SLACK)
        engine.communicate(timeout=PATIENCE)
        assert eventually(lambda: observer.match([b"a", b"b"], timeout=PATIENCE) == [])
    finally:
        engine.kill()
        engine.communicate(timeout=PATIENCE)
    assert observer.stats().degraded == 0


def test_a_close_is_bounded_though_the_master_is_stopped(cleanup: ExitStack, tmp_path: Path) -> None:
    process = cleanup.enter_context(MasterProcess(tmp_path, **FAST))
    engine = engine_of(cleanup, "one", f"umbp://{process.doors['native']}")
    assert engine.client.flush(PATIENCE)
    process.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        engine.client.close()
        assert time.monotonic() - began <= SETTINGS.close_timeout + SLACK
        assert engine.client.close(PATIENCE), "the thread ends"
    finally:
        process.process.send_signal(signal.SIGCONT)


def test_without_a_native_door_grpc_is_spoken_until_there_is_one(cleanup: ExitStack, tmp_path: Path) -> None:
    both = cleanup.enter_context(MasterProcess(tmp_path, **FAST))
    doors = dict(both.doors)
    both.end()
    only = cleanup.enter_context(MasterProcess(tmp_path, f"--listen={doors['grpc']}", "--native-listen=none", **FAST))
    assert "native" not in only.doors
    engine = engine_of(cleanup, "one", f"umbp://{doors['native']},grpc://{doors['grpc']}")
    client = engine.client
    assert client.flush(PATIENCE)
    assert (client.stats().native, engine.known(client)) == (False, True)
    only.end()
    cleanup.enter_context(
        MasterProcess(tmp_path, f"--listen={doors['grpc']}", f"--native-listen={doors['native']}", **FAST)
    )
    assert eventually(lambda: client.stats().native)
    assert client.flush(PATIENCE)
    assert eventually(lambda: engine.known(client))


@pytest.mark.parametrize("door", ["umbp://localhost:{native}", "grpc://localhost:{grpc}"])
def test_a_master_with_a_token_and_certificates_takes_those_who_have_them(
    cleanup: ExitStack, tmp_path: Path, door: str
) -> None:
    options = ("--tls-cert", str(CERTS / "server.pem"), "--tls-key", str(CERTS / "server.key"))
    mutual = ("--tls-client-ca", str(CERTS / "ca.pem"))
    process = cleanup.enter_context(MasterProcess(tmp_path, *options, *mutual, UMBP_MASTER_TOKEN="sesame", **FAST))
    address = door.format(**{name: process.doors[name].rpartition(":")[2] for name in ("native", "grpc")})
    tls = ClientTls(CERTS / "ca.pem", CERTS / "client.pem", CERTS / "client.key")
    engine = engine_of(cleanup, "one", address, dialer=Dialer("sesame", tls, "one"))
    assert engine.client.flush(PATIENCE)
    assert engine.known(engine.client)
    for dialer in (Dialer("wrong", tls), Dialer("sesame", ClientTls(CERTS / "ca.pem")), Dialer("sesame")):
        stranger = engine_of(cleanup, "stranger", address, dialer=dialer, settings=HASTY)
        assert eventually(lambda client=stranger.client: client.stats().failures > 0)  # type: ignore[misc]
        assert not stranger.client.stats().registered
