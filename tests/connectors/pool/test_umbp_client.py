"""The client with UMBP's names: keys, buffers, statuses, and what it tells a master."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.connectors.disk import Disk
from tests.master.app.master_process import MasterProcess
from umbp_connectors.config import resolve
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.create import create_client
from umbp_connectors.hookspecs import ClientSpec, hookimpl
from umbp_connectors.plugins import create_manager
from umbp_connectors.pool.buffers import memory_at
from umbp_connectors.pool.rows import ObjectRows
from umbp_connectors.pool.umbp_client import Client, ExternalKv
from umbp_core.errors import ConfigError, StateError
from umbp_core.ids import Identity, RankScope
from umbp_core.master.model import ExternalMatch
from umbp_core.outcomes import DeploymentMode, GetStatus, PutStatus
from umbp_core.ports import UMBPClient
from umbp_core.tiers import Tier

SIZE = 8192
IDENTITY = Identity("model", b"\x11" * 32, RankScope())
KEYS = [f"key {number}" for number in range(8)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(**extra: object) -> Client:
        values: dict[str, Any] = {"dram_capacity": 16 * SIZE, "ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"} | extra
        made.append(create_client(resolve(values, env={}).config, identity=IDENTITY, object_bytes=SIZE))
        return made[-1]

    yield make
    for client in made:
        client.close()


def objects(count: int = 8, nbytes: int = SIZE) -> list[np.ndarray]:
    return list(np.random.default_rng(7).integers(0, 256, (count, nbytes), dtype=np.uint8))


def test_it_is_what_the_port_promises(make: Callable[..., Client]) -> None:
    client: UMBPClient = make()
    assert client.deployment_mode is DeploymentMode.LOCAL
    assert not client.is_distributed


def test_first_writer_wins_and_sizes_must_match(make: Callable[..., Client]) -> None:
    client = make()
    first, second = objects(2)
    assert client.put("key", first) is PutStatus.STORED
    assert client.put("key", second) is PutStatus.PRESENT
    assert PutStatus.PRESENT.kept
    target = np.zeros(SIZE, dtype=np.uint8)
    assert client.get(b"key", target) is GetStatus.DRAM
    assert np.array_equal(target, first)
    assert client.get("key", target[:100]) is GetStatus.SIZE_MISMATCH
    assert client.get("other", target) is GetStatus.MISS
    assert (client.exists("key"), client.exists("other")) == (True, False)


def test_batches_give_a_status_for_each(make: Callable[..., Client]) -> None:
    client = make()
    data = objects()
    assert client.batch_put(KEYS[:4], data[:4]) == [PutStatus.STORED] * 4
    too_large = np.zeros(SIZE + 4096, dtype=np.uint8)
    statuses = client.batch_put_with_depth(KEYS[3:6], [data[3], too_large, data[5]], [3, 4, -1])
    assert statuses == [PutStatus.PRESENT, PutStatus.TOO_LARGE, PutStatus.STORED]
    assert client.batch_put_with_depth(KEYS[6:7], data[6:7], []) == [PutStatus.STORED]
    assert client.batch_exists(KEYS) == [True] * 4 + [False, True, True, False]
    assert client.batch_exists_consecutive(KEYS) == 4
    assert client.batch_exists_consecutive([]) == 0
    targets = [np.zeros(SIZE, dtype=np.uint8) for _ in KEYS]
    hits = [status.hit for status in client.batch_get(KEYS, targets)]
    assert hits == client.batch_exists(KEYS)
    assert all(np.array_equal(target, each) for target, each, hit in zip(targets, data, hits, strict=True) if hit)


@pytest.mark.parametrize("kind", ["address", "memoryview", "bytearray", "segments", "addresses", "rows"])
def test_every_kind_of_buffer(make: Callable[..., Client], kind: str) -> None:
    client = make()
    data = np.random.default_rng(3).integers(0, 256, (4, SIZE), dtype=np.uint8)
    target = np.zeros_like(data)

    def given(rows: np.ndarray) -> Any:
        at = rows.ctypes.data
        return {
            "address": [(at + row * SIZE, SIZE) for row in range(4)],
            "memoryview": [row.data for row in rows],
            "bytearray": [bytearray(row) for row in rows],
            "segments": [(row[:100], row[100:]) for row in rows],
            "addresses": [((at + row * SIZE, 100), (at + row * SIZE + 100, SIZE - 100)) for row in range(4)],
            "rows": ObjectRows(rows, range(4)),
        }[kind]

    assert client.batch_put(KEYS[:4], given(data)) == [PutStatus.STORED] * 4
    into = given(target)
    assert client.batch_get(KEYS[:4], into) == [GetStatus.DRAM] * 4
    found = [bytes(each) for each in into] if kind == "bytearray" else [row.tobytes() for row in target]
    assert found == [row.tobytes() for row in data]


@pytest.mark.parametrize(("address", "nbytes"), [(0, 10), (-5, 10), (4096, -1)])
def test_what_is_no_memory_is_refused(make: Callable[..., Client], address: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="no memory"):
        make().put("key", (address, nbytes))
    assert memory_at(4096, 0).nbytes == 0


def test_flush_is_a_barrier(make: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    client = make()
    disk = Disk(monkeypatch)
    disk.hang("write")
    client.batch_put(KEYS, objects())
    assert not client.flush(0.05), "nothing is on the device yet"
    disk.work()
    assert client.flush(30)
    assert client.stats().tiers[Tier.SSD].objects == 8
    assert client.stats().counters.puts[PutStatus.STORED] == 8
    client.close()
    client.close()
    with closing(make()) as again:
        assert again.batch_exists_consecutive(KEYS) == 8


def test_clear_and_close_may_be_repeated(make: Callable[..., Client]) -> None:
    client = make()
    client.batch_put(KEYS, objects())
    assert client.clear()
    assert client.batch_exists(KEYS) == [False] * 8
    client.close()
    assert client.clear(), "there is nothing"
    with pytest.raises(StateError):
        client.exists("key")


def test_what_the_daemon_does_not_hear_is_not_cleared(make: Callable[..., Client], tmp_path: Path) -> None:
    assert not make(mode="daemon", daemon_socket=str(tmp_path / "nobody.sock")).clear()


def test_regions_are_forgotten_one_by_one(make: Callable[..., Client]) -> None:
    client = make()
    assert client.register_memory(4096, 8192)
    assert client.register_memory(65536, 8192)
    assert not client.register_memory(0, 8192)
    assert not client.register_memory(4096, 0)
    client.deregister_memory(4096)
    client.deregister_memory(12345)
    assert client.put("key", objects(1)[0]) is PutStatus.STORED, "memory need not be registered"


def test_without_a_master_external_kv_is_told_to_nobody(make: Callable[..., Client]) -> None:
    client = make()
    assert client.report_external_kv_blocks(["a"], Tier.HBM)
    assert client.revoke_external_kv_blocks(["a"], Tier.HBM)
    assert client.revoke_all_external_kv_blocks_at_tier(Tier.HBM)
    assert client.match_external_kv(["a"]) == []
    assert client.get_external_kv_hit_counts(["a"]) == []


def test_a_plug_in_may_make_the_pool(make: Callable[..., Client], tmp_path: Path) -> None:
    class Plugin:
        """Offers a pool of its own."""

        asked: ClassVar[list[ClientSpec]] = []

        @hookimpl
        def umbp_make_client(self, spec: ClientSpec) -> object:
            self.asked.append(spec)
            return make()._pool

    config = resolve({}, env={}).config
    host = create_manager(config, entries=[])
    plugin = Plugin()
    host.register(plugin, "mine")
    with closing(create_client(config, identity=IDENTITY, object_bytes=SIZE, rank=1, ranks=2, plugins=host)) as client:
        assert client.put("key", objects(1)[0]) is PutStatus.STORED
    assert [(spec.rank, spec.ranks, spec.object_bytes) for spec in plugin.asked] == [(1, 2, SIZE)]


def test_only_a_plug_in_makes_a_distributed_client(make: Callable[..., Client]) -> None:
    class Plugin:
        """Stands for a pool of several hosts."""

        @hookimpl
        def umbp_make_client(self, config: UmbpConfig) -> object:
            return make()._pool if config.mode == "distributed" else None

    config = resolve({"mode": "distributed"}, env={}).config
    host = create_manager(config)
    with pytest.raises(ConfigError, match="no plug-in offers a client for mode 'distributed'"):
        create_client(config, identity=IDENTITY, object_bytes=SIZE, plugins=host)
    host.register(Plugin(), "several-hosts")
    with closing(create_client(config, identity=IDENTITY, object_bytes=SIZE, plugins=host)) as client:
        assert (client.deployment_mode, client.is_distributed) == (DeploymentMode.DISTRIBUTED, True)
        assert client.put("key", objects(1)[0]) is PutStatus.STORED


def test_a_token_that_cannot_be_used_leaves_nothing_open(make: Callable[..., Client], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        make(master_address="umbp://127.0.0.1:9", master_token_file=str(tmp_path / "missing"))
    assert make().put("key", objects(1)[0]) is PutStatus.STORED


class Line:
    """A master's line that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[bytes, ...], int]] = []
        self.closed = 0

    def report(self, hashes: Sequence[bytes], tier: int) -> None:
        self.told.append(("report", tuple(hashes), tier))

    def revoke(self, hashes: Sequence[bytes], tier: int) -> None:
        self.told.append(("revoke", tuple(hashes), tier))

    def clear(self, tier: int) -> None:
        self.told.append(("clear", (), tier))

    def match(
        self, hashes: Sequence[bytes], count_as_hit: bool = False, timeout: float | None = None
    ) -> list[ExternalMatch]:
        return [ExternalMatch("node", "", {int(count_as_hit): list(hashes)})]

    def hit_counts(self, hashes: Sequence[bytes], timeout: float | None = None) -> list[tuple[bytes, int]]:
        return [(each, 1) for each in hashes]

    def flush(self, timeout: float) -> bool:
        return not self.told or self.told[-1][0] != "report"

    def close(self, timeout: float | None = None, unregister: bool = True) -> bool:
        self.closed += 1
        return True


def test_a_master_is_told_and_asked(make: Callable[..., Client]) -> None:
    line, external = Line(), ExternalKv()
    external.connect(line)
    client = Client(make()._pool, DeploymentMode.DISTRIBUTED, external)
    assert client.is_distributed
    assert client.report_external_kv_blocks(["a", b"b"], Tier.HBM)
    assert client.report_external_kv_blocks([], Tier.HBM), "nothing to tell"
    assert client.report_external_kv_blocks(["c"], Tier.DRAM)
    assert dict(external.snapshot()) == {1: [b"a", b"b"], 2: [b"c"]}
    assert not client.flush(5), "the master does not know it yet"
    assert client.revoke_external_kv_blocks(["a", "unknown"], Tier.HBM)
    assert client.flush(5)
    assert dict(external.snapshot()) == {1: [b"b"], 2: [b"c"]}
    assert client.revoke_all_external_kv_blocks_at_tier(Tier.HBM)
    assert dict(external.snapshot()) == {2: [b"c"]}
    assert line.told == [
        ("report", (b"a", b"b"), 1),
        ("report", (b"c",), 2),
        ("revoke", (b"a", b"unknown"), 1),
        ("clear", (), 1),
    ]
    assert client.match_external_kv(["x"], count_as_hit=True) == [ExternalMatch("node", "", {1: [b"x"]})]
    assert client.get_external_kv_hit_counts(["x"]) == [(b"x", 1)]
    assert client.clear()
    assert line.told[-1] == ("clear", (), 2)
    client.close()
    client.close()
    assert line.closed == 1


def test_threads_that_tell_the_same_hashes_leave_record_and_master_alike() -> None:
    line, external = Line(), ExternalKv()
    external.connect(line)

    def work() -> None:
        for number in range(300):
            hashes = [b"%d" % (number % 7)]
            external.report(hashes, 1)
            external.revoke(hashes, 1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    at_master: set[bytes] = set()
    for kind, hashes, _ in line.told:
        at_master = at_master | set(hashes) if kind == "report" else at_master - set(hashes)
    assert at_master == set(dict(external.snapshot()).get(1, ()))


def test_a_real_master_hears_of_external_kv(make: Callable[..., Client], tmp_path: Path) -> None:
    with MasterProcess(tmp_path) as master:
        address = f"umbp://{master.doors['native']}"
        teller = make(master_address=address, node_id="teller", node_tags="role=test", ssd_enabled=False)
        asker = make(master_address=address, node_id="asker", ssd_enabled=False)
        assert teller.report_external_kv_blocks(["1", "2"], Tier.DRAM)
        assert teller.report_external_kv_blocks(["2"], Tier.HBM)
        assert teller.flush(30)
        assert asker.flush(30), "it has found the master"
        (match,) = asker.match_external_kv(["1", "2", "3"], count_as_hit=True)
        assert (match.node_id, match.tiers) == ("teller", {1: [b"2"], 2: [b"1", b"2"]})
        assert asker.get_external_kv_hit_counts(["1", "3"]) == [(b"1", 1)]
        assert teller.revoke_all_external_kv_blocks_at_tier(Tier.DRAM)
        assert teller.flush(30)
        assert [m.tiers for m in asker.match_external_kv(["1", "2"])] == [{1: [b"2"]}]
        teller.close()
        assert asker.match_external_kv(["1", "2"]) == []
