"""Where a master remembers its nodes: written behind, bounded, tried again, and never a refusal to start."""

import logging
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import fakeredis
import pytest
import redis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.connectors.waiting import until
from umbp_connectors.master import stores
from umbp_connectors.master.redis_store import RedisBackend, redis_backend
from umbp_connectors.master.settings import MasterConfig, resolve
from umbp_connectors.master.sqlite_store import SqliteBackend, default_folder
from umbp_connectors.master.stores import NoStore, StoreUnavailable, WriteBehindStore
from umbp_core.errors import ConfigError
from umbp_core.master.model import ClientRecord, TierCapacity

DEADLINE = 60.0


@pytest.fixture(autouse=True, scope="module")
def patient_end() -> Iterator[None]:
    """Two seconds are enough for the words of a master, and may not be for a test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "CLOSE_SECONDS", DEADLINE)
        yield


def record(node_id: str = "n1", peer_address: str = "10.0.0.1:17000") -> ClientRecord:
    return ClientRecord(
        node_id, "10.0.0.1", peer_address, b"\x00desc\xff", ("role=decode",), 7, (TierCapacity(2, 100, 50),)
    )


def opened(folder: Path) -> tuple[WriteBehindStore, list[ClientRecord]]:
    store = WriteBehindStore(SqliteBackend(folder))
    return store, store.load()


def keep(folder: Path) -> None:
    """Leave a store with one record in ``folder``."""
    store, _ = opened(folder)
    store.save(record())
    store.close()


def kept_in(folder: Path) -> list[ClientRecord]:
    store, records = opened(folder)
    store.close()
    return sorted(records, key=lambda r: r.node_id)


class PlayedBackend:
    """A backend in memory that is away when it is told to be."""

    name = "played"

    def __init__(self) -> None:
        self.table: dict[str, bytes] = {}
        self.away = False
        self.writes = 0
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def open(self) -> Sequence[tuple[str, bytes]]:
        if self.away:
            raise StoreUnavailable("the played store is away")
        return list(self.table.items())

    def write(self, words: Mapping[str, bytes | None]) -> None:
        self.entered.set()
        assert self.gate.wait(DEADLINE)
        if self.away:
            raise StoreUnavailable("the played store is away")
        self.writes += 1
        for node_id, word in words.items():
            if word is None:
                self.table.pop(node_id, None)
            else:
                self.table[node_id] = word

    def close(self) -> None:
        self.closed = True


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    store, records = opened(tmp_path / "new" / "folder")
    assert records == []
    store.save(record("n1", "old"))
    store.save(record("n1"))
    store.save(record("n2"))
    store.save(record("n3"))
    store.delete("n2")
    store.delete("never")
    store.close()
    store.close()
    assert kept_in(tmp_path / "new" / "folder") == [record("n1"), record("n3")]
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o077 == 0


def test_what_was_flushed_is_in_the_file_while_the_master_still_runs(tmp_path: Path) -> None:
    store, _ = opened(tmp_path)
    store.save(record())
    assert store.flush(DEADLINE)
    with sqlite3.connect(tmp_path / "nodes.sqlite") as other:
        assert other.execute("SELECT node_id FROM nodes").fetchall() == [("n1",)]
    other.close()
    store.close()


def test_a_second_master_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    store, _ = opened(tmp_path)
    with pytest.raises(StoreUnavailable, match="belongs to a master that runs"):
        opened(tmp_path)
    store.save(record())
    store.close()
    assert kept_in(tmp_path) == [record()]


def spoil_header(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 200)


def spoil_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xee" * (len(content) - 4096)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def other_version(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


def other_tables(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE something (x)")
    connection.close()


@pytest.mark.parametrize("spoil", [spoil_header, spoil_page, truncate, other_version, other_tables])
def test_a_file_that_cannot_be_used_is_moved_aside_with_one_sentence(
    tmp_path: Path, spoil: object, caplog: pytest.LogCaptureFixture
) -> None:
    for round_number in range(2):
        store, _ = opened(tmp_path)
        for number in range(100):
            store.save(record(f"n{number}"))
        store.close()
        spoil(tmp_path / "nodes.sqlite")  # type: ignore[operator]
        spoilt = (tmp_path / "nodes.sqlite").read_bytes()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert kept_in(tmp_path) == [], round_number
        assert len(caplog.records) == 1
        assert "was moved to nodes.sqlite.corrupt" in caplog.text
        assert (tmp_path / "nodes.sqlite.corrupt").read_bytes() == spoilt
    keep(tmp_path)
    assert kept_in(tmp_path) == [record()]


@pytest.mark.parametrize("words", ["database or disk is full", "disk I/O error", "unable to open database file"])
def test_a_file_that_cannot_be_read_today_is_left_where_it_is(
    tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path)

    def unreadable(_: SqliteBackend) -> None:
        raise sqlite3.OperationalError(words)

    with monkeypatch.context() as patch:
        patch.setattr(SqliteBackend, "_read", unreadable)
        for _ in range(2):
            backend = SqliteBackend(tmp_path)
            with pytest.raises(StoreUnavailable, match=words):
                backend.open()
            backend.close()
    assert kept_in(tmp_path) == [record()]
    assert not list(tmp_path.glob("*.corrupt*"))


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x80", "text", None, 5])
def test_a_record_that_cannot_be_read_is_left_out(
    tmp_path: Path, content: object, caplog: pytest.LogCaptureFixture
) -> None:
    keep(tmp_path)
    with sqlite3.connect(tmp_path / "nodes.sqlite") as other:
        other.execute("INSERT INTO nodes VALUES ('bad', ifnull(?, zeroblob(9)))", (content,))
    other.close()
    with caplog.at_level(logging.WARNING):
        assert kept_in(tmp_path) == [record()]
    assert "1 record(s) that cannot be read" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="ascii")
    with pytest.raises(StoreUnavailable, match="name a folder that can be written by --state-dir"):
        opened(tmp_path / "file" / "folder")


def test_a_folder_in_place_of_the_file_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "nodes.sqlite").mkdir()
    assert kept_in(tmp_path) == []
    assert (tmp_path / "nodes.sqlite.corrupt").is_dir()


def test_nobody_waits_for_a_store_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_PENDING", 3)
    backend = PlayedBackend()
    store = WriteBehindStore(backend)
    store.load()
    backend.gate.clear()
    store.save(record("first"))
    assert backend.entered.wait(DEADLINE)
    for number in range(10):
        store.save(record(f"n{number}"))
    store.save(record("n0", "new"))
    assert not store.flush(0.01)
    backend.gate.set()
    assert store.flush(DEADLINE)
    assert set(backend.table) == {"first", "n0", "n1", "n2"}
    store.close()
    assert backend.closed


def test_a_store_that_is_away_is_tried_again_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.001)
    backend = PlayedBackend()
    store = WriteBehindStore(backend)
    store.load()
    backend.away = True
    with caplog.at_level(logging.WARNING):
        store.save(record("n1", "old"))
        while store.stats().errors < 5:
            assert not store.flush(0.01)
        store.save(record("n1", "new"))
        store.delete("n2")
        backend.away = False
        assert store.flush(DEADLINE)
        store.close()
    assert [r.getMessage() for r in caplog.records] == [
        "umbp: the played store is away; tried again until it works",
        "umbp: the played store of nodes works again",
    ]
    assert [stores.decoded([("n1", backend.table["n1"])], "")[0].peer_address] == ["new"]
    assert store.stats().ops["write"].cumulative()[-1] == backend.writes


def test_a_store_that_stays_away_does_not_hold_up_the_end() -> None:
    backend = PlayedBackend()
    store = WriteBehindStore(backend)
    store.load()
    backend.away = True
    store.save(record())
    store.close()
    assert backend.closed
    assert backend.table == {}


def test_a_store_that_is_not_required_may_be_away_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    backend = PlayedBackend()
    backend.away = True
    with pytest.raises(StoreUnavailable):
        WriteBehindStore(backend).load()
    store = WriteBehindStore(backend, required=False)
    with caplog.at_level(logging.WARNING):
        assert store.load() == []
    assert "starts without what it knew of nodes" in caplog.text
    backend.away = False
    store.save(record())
    assert store.flush(DEADLINE)
    assert set(backend.table) == {"n1"}
    store.close()


def away_at_the_start(*nodes: str) -> tuple[PlayedBackend, WriteBehindStore]:
    """A store of ``nodes`` that nobody could read, and can now."""
    backend = PlayedBackend()
    earlier = WriteBehindStore(backend)
    earlier.load()
    for node in nodes:
        earlier.save(record(node))
    earlier.close()
    backend.away = True
    store = WriteBehindStore(backend, required=False)
    assert store.load() == []
    backend.away = False
    return backend, store


def test_what_is_read_late_is_handed_over_before_anything_is_written() -> None:
    """A node that lost its address with the master's memory must not write over it."""
    backend, store = away_at_the_start("n1", "n2", "n3")
    writes = backend.writes
    store.catch_up(lambda late: pytest.fail(f"{late} before anybody could read it"))
    store.save(record("n1", ""))
    store.delete("n3")
    until(lambda: store._late)
    assert not store.flush(0.01)
    assert backend.writes == writes
    found = []

    def take(late: list[ClientRecord]) -> None:
        found.extend(late)
        store.save(late[0])

    store.catch_up(take)
    store.catch_up(take)
    assert found == [record("n1"), record("n2")], "once, and without what was deleted"
    assert store.flush(DEADLINE)
    store.close()
    assert stores.decoded(list(backend.table.items()), "") == [record("n1"), record("n2")]


def test_a_master_that_ends_before_it_caught_up_leaves_what_an_earlier_one_knew() -> None:
    backend, store = away_at_the_start("n1", "n2")
    store.save(record("n1", ""))
    store.save(record("n4"))
    store.delete("n2")
    store.close()
    assert stores.decoded(list(backend.table.items()), "") == [record("n1"), record("n4")]


def test_a_store_that_comes_back_while_the_master_ends_gets_the_last_words() -> None:
    """Also those of a write that began before, and failed."""
    backend = PlayedBackend()
    store = WriteBehindStore(backend)
    store.load()
    backend.gate.clear()
    write = backend.write

    def fail_once(words: Mapping[str, bytes | None]) -> None:
        backend.write = write  # type: ignore[method-assign]
        backend.entered.set()
        assert backend.gate.wait(DEADLINE)
        raise StoreUnavailable("the played store was away")

    backend.write = fail_once  # type: ignore[method-assign]
    store.save(record())
    assert backend.entered.wait(DEADLINE)
    ending = threading.Thread(target=store.close)
    ending.start()
    until(lambda: store._closing)
    backend.gate.set()
    ending.join(DEADLINE)
    assert set(backend.table) == {"n1"}
    assert backend.closed


def test_no_store_keeps_nothing() -> None:
    store = NoStore()
    store.save(record())
    store.delete("n1")
    assert store.load() == []
    assert store.stats() is None
    store.close()


class StoreMachine(RuleBasedStateMachine):
    """Whatever is told, and whenever the store is away or the master ends, the last words survive."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = PlayedBackend()
        self.model: dict[str, str] = {}
        self.store: WriteBehindStore | None = None

    @precondition(lambda self: self.store is None)
    @rule()
    def start(self) -> None:
        self.backend.away = False
        self.store = WriteBehindStore(self.backend)
        assert {r.node_id: r.peer_address for r in self.store.load()} == self.model

    @precondition(lambda self: self.store is not None)
    @rule(node=st.sampled_from("abc"), peer=st.sampled_from("xyz"))
    def save(self, node: str, peer: str) -> None:
        assert self.store is not None
        self.store.save(record(node, peer))
        self.model[node] = peer

    @precondition(lambda self: self.store is not None)
    @rule(node=st.sampled_from("abc"))
    def delete(self, node: str) -> None:
        assert self.store is not None
        self.store.delete(node)
        self.model.pop(node, None)

    @rule(away=st.booleans())
    def weather(self, away: bool) -> None:
        self.backend.away = away

    @precondition(lambda self: self.store is not None)
    @rule()
    def stop(self) -> None:
        assert self.store is not None
        self.backend.away = False
        self.store.close()
        self.store = None
        assert self.backend.closed

    @invariant()
    def what_is_written_was_told(self) -> None:
        if self.store is None:
            told = {r.node_id: r.peer_address for r in stores.decoded(list(self.backend.table.items()), "")}
            assert told == self.model

    def teardown(self) -> None:
        if self.store is not None:
            self.store.close()


TestStoreMachine = StoreMachine.TestCase


@pytest.fixture
def server() -> fakeredis.FakeServer:
    return fakeredis.FakeServer()


def in_redis(server: fakeredis.FakeServer, namespace: str = "default") -> WriteBehindStore:
    return WriteBehindStore(RedisBackend(lambda: fakeredis.FakeRedis(server=server), namespace, "played"))


def test_redis_keeps_records_per_namespace(server: fakeredis.FakeServer) -> None:
    store = in_redis(server)
    assert store.load() == []
    for number in range(50):
        store.save(record(f"n{number}"))
    store.delete("n0")
    store.close()
    again = in_redis(server)
    assert sorted(r.node_id for r in again.load()) == sorted(f"n{number}" for number in range(1, 50))
    again.close()
    other = in_redis(server, "blue")
    assert other.load() == []
    other.close()


def test_redis_that_goes_away_is_tried_again(server: fakeredis.FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.001)
    store = in_redis(server)
    store.load()
    server.connected = False
    store.save(record())
    while not store.stats().errors:
        assert not store.flush(0.01)
    with pytest.raises(StoreUnavailable, match="cannot be kept in Redis at played"):
        in_redis(server).load()
    server.connected = True
    assert store.flush(DEADLINE)
    assert store.stats().backend == "redis"
    store.close()
    assert fakeredis.FakeRedis(server=server).hkeys("umbp:default:nodes") == [b"n1"]


def test_redis_record_that_cannot_be_read_is_left_out(server: fakeredis.FakeServer) -> None:
    fakeredis.FakeRedis(server=server).hset("umbp:default:nodes", mapping={"bad": b"\xff", b"\xff\xfe": b""})
    store = in_redis(server)
    assert store.load() == []
    store.close()


def test_redis_is_reached_as_configured() -> None:
    config = resolve(
        {
            "redis_uri": "tcp://user:geheim@127.0.0.1:1/3",
            "redis_connect_timeout_ms": 300,
            "redis_socket_timeout_ms": 200,
        },
        {},
    ).config
    with pytest.raises(StoreUnavailable, match=r"Redis at 127.0.0.1:1/3 \(") as caught:
        redis_backend(config).open()
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("uri", ["http://x", "redis://h:port", "10.0.0.1:6379"])
def test_a_redis_uri_that_is_none_is_a_sentence(uri: str) -> None:
    with pytest.raises(ConfigError, match="redis_uri"):
        redis_backend(MasterConfig(redis_uri=uri))


def test_redis_client_gets_the_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(
        redis.Redis, "from_url", lambda url, **options: seen.append({"url": url} | options) or fakeredis.FakeRedis()
    )
    redis_backend(MasterConfig(redis_password="p", redis_socket_timeout_ms=250)).open()
    assert seen[0]["url"] == "redis://127.0.0.1:6379"
    assert (seen[0]["password"], seen[0]["socket_timeout"], seen[0]["socket_connect_timeout"]) == ("p", 0.25, 1.0)


@pytest.mark.parametrize(
    ("options", "env", "folder"),
    [
        ({}, {"XDG_STATE_HOME": "/s"}, "/s/umbp/master-127.0.0.1_50051"),
        ({}, {"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/umbp/master-127.0.0.1_50051"),
        ({"listen": "[::]:7"}, {"HOME": "/h"}, "/h/.local/state/umbp/master-_____7"),
        ({"listen": "none"}, {"HOME": "/h"}, "/h/.local/state/umbp/master-127.0.0.1_50052"),
        ({"listen": "h:0"}, {"HOME": "/h"}, None),
        ({}, {}, None),
        (
            {"listen": "none", "native_listen": "none", "native_socket": "/run/m.sock"},
            {"HOME": "/h"},
            "/h/.local/state/umbp/master-m.sock",
        ),
    ],
)
def test_default_folder_belongs_to_the_address(
    options: dict[str, str], env: dict[str, str], folder: str | None
) -> None:
    assert default_folder(resolve(options, {}).config, env) == (None if folder is None else Path(folder))
