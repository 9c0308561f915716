"""The catalogue: real SQLite files, real corruption, a real kill."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.connectors.disk import FullDisk
from tests.connectors.gate import Gate
from umbp_connectors.pool.capacity import catalogue_allowance
from umbp_connectors.pool.catalogue import Catalogue
from umbp_connectors.pool.catalogue_file import CatalogueFile
from umbp_connectors.pool.catalogue_schema import CatalogueRow
from umbp_core.errors import StateError, TierUnavailable

IDENTITY = b"i" * 32
SLOTS = 64


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Catalogue]]:
    made: list[Catalogue] = []

    def make(identity: bytes = IDENTITY, ranks: int = 1, slots: int = SLOTS, **options: int) -> Catalogue:
        made.append(Catalogue(tmp_path / "catalogue-0.sqlite", identity, ranks, slots=slots, **options))
        return made[-1]

    yield make
    for catalogue in made:
        catalogue.close()


def _row(key: bytes, slot: int, ranks: int = 1, depth: int = 0) -> CatalogueRow:
    return CatalogueRow(key, slot, 100 + slot, bytes([slot]) * 16 * ranks, depth)


def _holding(make: Callable[..., Catalogue], rows: list[CatalogueRow]) -> Catalogue:
    """An open catalogue with ``rows`` on disk."""
    catalogue = make()
    catalogue.open()
    catalogue.record(rows)
    assert catalogue.flush(10)
    return catalogue


def _reopened(make: Callable[..., Catalogue], old: Catalogue, **options: int) -> list[CatalogueRow]:
    old.close()
    fresh = make(**options)
    rows = fresh.open()
    fresh.close()
    return rows


def test_rows_come_back_in_the_order_of_their_use(make: Callable[..., Catalogue]) -> None:
    catalogue = make(ranks=2)
    assert catalogue.open() == []
    rows = [_row(b"key%d" % slot, slot, 2, depth=slot) for slot in (5, 1, 3)]
    catalogue.record(rows)
    catalogue.record([rows[0]])
    assert _reopened(make, catalogue, ranks=2) == [rows[1], rows[2], rows[0]]


def test_flush_is_a_barrier(make: Callable[..., Catalogue]) -> None:
    catalogue = make()
    catalogue.open()
    for slot in range(SLOTS):
        catalogue.record([_row(b"k%d" % slot, slot)])
    catalogue.forget([b"k7"])
    assert catalogue.flush(10)
    # A second connection is kept out while the catalogue is open, so look at a copy of the files.
    copy = catalogue.path.with_name("copy.sqlite")
    for suffix in ("", "-wal"):
        part = catalogue.path.with_name(catalogue.path.name + suffix)
        if part.exists():
            copy.with_name(copy.name + suffix).write_bytes(part.read_bytes())
    connection = sqlite3.connect(copy)
    assert connection.execute("SELECT count(*) FROM objects").fetchone() == (SLOTS - 1,)
    connection.close()


def test_a_reused_slot_belongs_to_the_last_key(make: Callable[..., Catalogue]) -> None:
    catalogue = make()
    catalogue.open()
    catalogue.record([_row(b"old", 3)])
    assert catalogue.flush(10)
    catalogue.forget([b"old"])
    catalogue.record([_row(b"new", 3)])
    catalogue.record([_row(b"gone", 4)])
    catalogue.forget([b"gone"])
    assert _reopened(make, catalogue) == [_row(b"new", 3)]


def test_a_slot_that_was_never_forgotten_is_taken_over(make: Callable[..., Catalogue]) -> None:
    catalogue = make()
    catalogue.open()
    catalogue.record([_row(b"old", 3)])
    assert catalogue.flush(10)
    catalogue.record([_row(b"new", 3)])
    assert _reopened(make, catalogue) == [_row(b"new", 3)]


@pytest.mark.parametrize("row", [(b"k", -1, 1, bytes(16)), (b"k", SLOTS, 1, bytes(16)), (b"k", 0, 1, bytes(15))])
def test_impossible_rows_are_our_own_mistake(
    make: Callable[..., Catalogue], row: tuple[bytes, int, int, bytes]
) -> None:
    catalogue = make()
    catalogue.open()
    with pytest.raises(StateError, match="cannot be recorded"):
        catalogue.record([CatalogueRow(*row)])


def test_a_smaller_capacity_keeps_what_fits(make: Callable[..., Catalogue]) -> None:
    catalogue = make()
    catalogue.open()
    catalogue.record([_row(b"a", 3), _row(b"b", 40)])
    assert _reopened(make, catalogue, slots=16) == [_row(b"a", 3)]
    fresh = make()
    assert fresh.open() == [_row(b"a", 3)], "what did not fit was forgotten for good: its slot may be another's now"


@pytest.mark.parametrize(
    "change", [{"identity": b"j" * 32}, {"ranks": 2}, {"slot_bytes": 4096}], ids=["identity", "ranks", "slot_bytes"]
)
def test_a_catalogue_of_something_else_is_moved_aside(
    make: Callable[..., Catalogue], caplog: pytest.LogCaptureFixture, change: dict[str, object]
) -> None:
    catalogue = make()
    catalogue.open()
    catalogue.record([_row(b"a", 3)])
    catalogue.close()
    with caplog.at_level(logging.WARNING):
        assert make(**change).open() == []
    assert len(caplog.records) == 1
    assert "is another one" in caplog.text
    assert catalogue.path.with_name(catalogue.path.name + ".corrupt-0").exists()


def _overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "garbage": lambda path: path.write_bytes(os.urandom(20000)),
    "text": lambda path: path.write_text("not a catalogue at all\n"),
    "header": lambda path: _overwrite(path, 0, bytes(100)),
    "pages": lambda path: _overwrite(path, 4096, os.urandom(path.stat().st_size - 4096)),
    "tail": lambda path: os.truncate(path, path.stat().st_size // 2),
    "foreign": lambda path: _make_foreign(path),
    # SQLite quotes what it does not understand, and then its own sentence is no text.
    "letters": lambda path: path.write_bytes(path.read_bytes().replace(b"WITHOUT ROWID", b"WITHOUT ROW\xceD")),
}


def _make_foreign(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    connection.close()


@pytest.mark.parametrize("kind", sorted(CORRUPTIONS))
def test_a_corrupt_catalogue_is_moved_aside_and_never_refuses(
    make: Callable[..., Catalogue], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    catalogue = make()
    catalogue.open()
    catalogue.record([_row(b"key %d" % slot * 20, slot) for slot in range(SLOTS)])
    catalogue.close()
    CORRUPTIONS[kind](catalogue.path)
    fresh = make()
    with caplog.at_level(logging.WARNING):
        assert fresh.open() == []
    assert len(caplog.records) == 1
    assert "the SSD tier starts empty" in caplog.text
    assert fresh.path.with_name(fresh.path.name + ".corrupt-0").exists()
    fresh.record([_row(b"again", 1)])
    assert _reopened(make, fresh) == [_row(b"again", 1)]


def test_an_empty_file_is_a_new_catalogue(make: Callable[..., Catalogue], caplog: pytest.LogCaptureFixture) -> None:
    catalogue = make()
    catalogue.path.touch()
    assert catalogue.open() == []
    assert not caplog.records


def test_only_the_latest_corrupt_file_is_kept(make: Callable[..., Catalogue]) -> None:
    for _ in range(3):
        catalogue = make()
        catalogue.open()
        catalogue.close()
        catalogue.path.write_bytes(b"garbage" * 1000)
    make().open()
    asides = [path.name for path in catalogue.path.parent.glob("*.corrupt-*")]
    assert asides == ["catalogue-0.sqlite.corrupt-2"]


def test_a_corrupt_file_that_is_too_large_to_keep_is_removed(make: Callable[..., Catalogue]) -> None:
    catalogue = make(max_bytes=3 << 20)
    catalogue.path.write_bytes(bytes(2 << 20))
    assert catalogue.open() == []
    assert not list(catalogue.path.parent.glob("*.corrupt-*"))


def test_a_folder_that_is_not_there_makes_the_tier_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere" / "c.sqlite", tmp_path / "file" / "c.sqlite", Path("/proc/self/c.sqlite")):
        with pytest.raises(TierUnavailable, match="cannot be used"):
            Catalogue(path, IDENTITY, 1, slots=4).open()


def test_a_folder_in_place_of_the_file_is_moved_aside(make: Callable[..., Catalogue]) -> None:
    catalogue = make()
    catalogue.path.mkdir()
    assert catalogue.open() == []
    assert catalogue.path.is_file()


def test_a_second_owner_is_refused_and_harms_nothing(make: Callable[..., Catalogue]) -> None:
    catalogue = make()
    catalogue.open()
    with pytest.raises(TierUnavailable, match="one engine only"):
        make().open()
    with pytest.raises(StateError, match="already open"):
        catalogue.open()
    catalogue.record([_row(b"a", 1)])
    assert _reopened(make, catalogue) == [_row(b"a", 1)]


def _held(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds the writer before it commits."""
    gate = Gate(catalogue._commit)
    monkeypatch.setattr(catalogue, "_commit", gate)
    return gate


def test_an_overflow_is_counted_and_costs_only_what_did_not_fit(
    make: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = make(max_pending=4)
    gate = _held(catalogue, monkeypatch)
    catalogue.open()
    catalogue.record([_row(b"first", 0)])
    gate.wait_until_held()
    catalogue.record([_row(b"k%d" % slot, slot) for slot in range(1, 10)])
    catalogue.forget([b"first"])
    assert catalogue.dropped == 5
    assert not catalogue.flush(0), "time ran out"
    gate.open()
    assert not catalogue.flush(10), "some are not recorded"
    assert catalogue.unrecorded() == {b"k%d" % slot for slot in range(5, 10)}
    catalogue.forget(catalogue.unrecorded())
    assert catalogue.flush(10), "and nobody misses them"
    assert [row.key for row in _reopened(make, catalogue)] == [b"k1", b"k2", b"k3", b"k4"]


def test_flush_waits_for_the_batch_that_is_being_written(
    make: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = make()
    gate = _held(catalogue, monkeypatch)
    catalogue.open()
    catalogue.record([_row(b"first", 0)])
    gate.wait_until_held()
    assert not catalogue.flush(0.01), "nothing is queued, but the batch is not committed"
    gate.open()
    assert catalogue.flush(10)


def test_a_disk_that_refuses_costs_one_warning(
    make: Callable[..., Catalogue], caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = make()
    catalogue.open()
    assert catalogue._file.connection is not None
    catalogue._file.connection.execute("PRAGMA max_page_count=8")
    with caplog.at_level(logging.WARNING):
        for slot in range(SLOTS):
            catalogue.record([_row(b"%d" % slot * 400, slot)])
            catalogue.flush(10)
    assert 0 < catalogue.dropped < SLOTS
    assert len(caplog.records) == 1
    assert "not found after a restart" in caplog.text
    assert len(_reopened(make, catalogue)) == SLOTS - catalogue.dropped


def test_what_is_forgotten_while_the_disk_refuses_is_forgotten_later(
    make: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    catalogue = _holding(make, [_row(b"k%d" % slot, slot) for slot in range(SLOTS)])
    disk.full = True
    catalogue.forget([b"k%d" % slot for slot in range(8)])
    assert not catalogue.flush(60), "at once, not after a minute"
    catalogue.record([_row(b"new", 3)])
    assert not catalogue.flush(60)
    disk.full = False
    assert catalogue.wait_written(catalogue.seal(), 60)
    recorded = {b"new"} - catalogue.unrecorded()
    assert {row.key for row in _reopened(make, catalogue)} == {b"k%d" % slot for slot in range(8, SLOTS)} | recorded


def test_a_catalogue_that_is_closed_while_the_disk_refuses_ends(
    make: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    catalogue = _holding(make, [_row(b"a", 1)])
    disk.full = True
    catalogue.forget([b"a"])
    catalogue.close()
    assert not catalogue.flush(10)


def test_everybody_whose_objects_are_not_recorded_is_told(
    make: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    catalogue = _holding(make, [])
    disk.full = True
    catalogue.record([_row(b"a", 1), _row(b"b", 2)])
    barriers = [catalogue.seal() for _ in range(3)]
    for barrier in barriers:
        catalogue.wait_written(barrier, 60)
    disk.full = False
    for barrier in barriers:
        assert catalogue.wait_written(barrier, 60)
        assert catalogue.unrecorded() == {b"a", b"b"}
    catalogue.record([_row(b"a", 1)])
    assert catalogue.wait_written(catalogue.seal(), 60)
    assert catalogue.unrecorded() == {b"b"}


def test_a_disk_that_is_full_at_the_start_takes_nothing_away(
    make: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = make()
    catalogue.open()
    rows = [_row(b"k%d" % slot, slot) for slot in range(SLOTS)]
    catalogue.record(rows)
    catalogue.close()
    FullDisk(monkeypatch).full = True
    assert _reopened(make, catalogue, slots=SLOTS - 1) == rows[:-1], "it cannot even be said that one does not fit"
    assert not list(catalogue.path.parent.glob("*.corrupt-*"))


@pytest.mark.parametrize("words", ["disk I/O error", "unable to open database file"])
def test_a_catalogue_that_cannot_be_read_today_is_left_where_it_is(
    make: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    catalogue = make()
    catalogue.open()
    catalogue.record([_row(b"a", 1)])
    catalogue.close()

    def unreadable(*_: object) -> None:
        raise sqlite3.OperationalError(words)

    with monkeypatch.context() as patch:
        patch.setattr(CatalogueFile, "_verify", unreadable)
        with pytest.raises(TierUnavailable, match=words):
            make().open()
    assert _reopened(make, catalogue) == [_row(b"a", 1)]


def test_a_writer_that_dies_loses_rows_and_blocks_nobody(
    make: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = make()

    def broken(batch: object) -> bool:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(catalogue, "_commit", broken)
    catalogue.open()
    catalogue.record([_row(b"a", 1)])
    assert not catalogue.flush(60)
    catalogue.record([_row(b"b", 2)])
    catalogue.forget([b"a"])
    assert catalogue.dropped == 1
    assert not catalogue.flush(60)
    assert "is not written any more" in caplog.text
    catalogue.close()


def test_close_writes_what_is_pending_and_may_be_repeated(make: Callable[..., Catalogue]) -> None:
    catalogue = make()
    catalogue.close()
    catalogue.open()
    catalogue.record([_row(b"k%d" % slot, slot) for slot in range(SLOTS)])
    catalogue.close()
    catalogue.close()
    assert not catalogue.flush(1), "a closed catalogue writes nothing"
    assert len(_reopened(make, catalogue)) == SLOTS


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("slots", [1, 500, 4000])
def test_the_allowance_is_never_exceeded(make: Callable[..., Catalogue], slots: int, ranks: int) -> None:
    allowance = catalogue_allowance(slots, ranks)
    other = Catalogue(make().path.with_name("catalogue-1.sqlite"), IDENTITY, ranks, slots=slots)
    other.open()
    other.record([CatalogueRow(os.urandom(36), slot, 1, bytes(16 * ranks)) for slot in range(slots)])
    other.close()
    catalogue = make(slots=slots, ranks=ranks, max_bytes=allowance)
    catalogue.open()
    most = 0
    for _ in range(3):
        for start in range(0, slots, 500):
            rows = [
                CatalogueRow(os.urandom(36), slot, 1 << 20, os.urandom(16 * ranks), 1000)
                for slot in range(start, min(slots, start + 500))
            ]
            catalogue.record(rows)
            assert catalogue.flush(60)
            most = max(most, sum(path.stat().st_size for path in catalogue.path.parent.iterdir()))
    assert most <= allowance
    assert catalogue.dropped == 0
    assert len(_reopened(make, catalogue, slots=slots, ranks=ranks, max_bytes=allowance)) == slots
    assert other.path.exists(), "a catalogue of another layout is kept while it is small"


def test_other_catalogues_go_when_they_take_too_much(make: Callable[..., Catalogue], tmp_path: Path) -> None:
    for number in range(1, 4):
        path = tmp_path / f"catalogue-{number}.sqlite"
        path.write_bytes(bytes(500 << 10))
        os.utime(path, (number, number))
    catalogue = make(max_bytes=3 << 20)
    catalogue.open()
    assert sorted(path.name for path in tmp_path.glob("catalogue-[1-9]*")) == [
        "catalogue-2.sqlite",
        "catalogue-3.sqlite",
    ]


def test_a_folder_beside_a_catalogue_is_left_alone(make: Callable[..., Catalogue], tmp_path: Path) -> None:
    (tmp_path / "catalogue-of-mine").mkdir()
    (tmp_path / "catalogue-1.sqlite").write_bytes(bytes(1 << 20))
    rows = [_row(b"key", 1)]
    held = _holding(lambda: make(max_bytes=1 << 20), rows)
    assert _reopened(make, held, max_bytes=1 << 20) == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue-0.sqlite", "catalogue-of-mine"]


def test_a_folder_that_nothing_can_be_removed_from_makes_the_tier_unavailable(
    make: Callable[..., Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "catalogue-1.sqlite").write_bytes(bytes(1 << 20))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(TierUnavailable, match="Input/output"):
            make(max_bytes=1 << 20).open()
    assert make(max_bytes=1 << 20).open() == []


def test_a_kill_leaves_what_was_flushed(make: Callable[..., Catalogue]) -> None:
    script = """
        import sys
        from umbp_connectors.pool.catalogue import Catalogue
        from umbp_connectors.pool.catalogue_schema import CatalogueRow
        catalogue = Catalogue(sys.argv[1], b"i" * 32, 1, slots=64)
        catalogue.open()
        catalogue.record([CatalogueRow(b"k%d" % slot, slot, 100 + slot, bytes([slot]) * 16) for slot in range(40)])
        assert catalogue.flush(60)
        print("flushed", flush=True)
        while True:
            for slot in range(40, 64):
                catalogue.record([CatalogueRow(b"k%d" % slot, slot, 100 + slot, bytes([slot]) * 16)])
                catalogue.forget([b"k%d" % (slot - 1)] if slot > 40 else [])
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    path = make().path
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"flushed\n"
        child.send_signal(signal.SIGKILL)
    rows = {row.key: row for row in make().open()}
    for slot in range(40):
        assert rows[b"k%d" % slot] == _row(b"k%d" % slot, slot)
    assert not list(path.parent.glob("*.corrupt-*"))
