"""The SSD folder: layout, locks, bounds, and what happens when it is not fit for use."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from umbp_connectors.pool.catalogue_schema import CatalogueRow
from umbp_connectors.pool.folder import (
    FolderLock,
    NamespaceFolder,
    RankSlab,
    catalogue_allowance,
    namespace_dir,
    open_rank_slab,
    plan_capacity,
    slab_path,
    try_folder,
)
from umbp_core.errors import TierUnavailable

SLOT = 64 << 10
CAPACITY = 4 << 20
LAYOUT = b"\x11" * 32
OTHER = b"\x22" * 32
MARGIN = 1 << 20


@pytest.fixture
def ssd(tmp_path: Path) -> Path:
    return tmp_path / "ssd"


@pytest.fixture
def rank(ssd: Path) -> Iterator[Callable[..., RankSlab]]:
    opened: list[RankSlab] = []

    def rank(
        namespace: str = "model", number: int = 0, layout: bytes = LAYOUT, capacity: int = CAPACITY, ranks: int = 1
    ) -> RankSlab:
        opened.append(open_rank_slab(ssd, namespace, number, layout, SLOT, capacity, ranks, patience_s=0))
        return opened[-1]

    yield rank
    for slab in opened:
        slab.close()


def _used(ssd: Path) -> int:
    return sum(path.stat().st_size for path in ssd.rglob("*") if path.is_file() and path.name[:4] in ("slab", "cata"))


def test_the_layout(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    opened = rank(number=3, ranks=4)
    leader = NamespaceFolder(ssd, "model")
    leader.open()
    catalogue = leader.catalogue(LAYOUT, LAYOUT, 4, opened.slots, SLOT)
    catalogue.open()
    home = namespace_dir(ssd, "model")
    assert len(home.name) == 16
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()) == sorted(
        ["LOCK", "identity.json", "catalogue-111111111111.sqlite", "catalogue-111111111111.sqlite-wal"]
        + ["rank3/LOCK", "rank3/slab-111111111111.bin"]
    )
    assert {path.stat().st_mode & 0o777 for path in (ssd, home, home / "rank3")} == {0o700}
    catalogue.close()
    leader.close()


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_all_ranks_get_the_same_and_the_sum_is_within_the_capacity(
    ssd: Path, rank: Callable[..., RankSlab], ranks: int
) -> None:
    capacity = CAPACITY * ranks
    slots = {rank(number=number, capacity=capacity, ranks=ranks).slots for number in range(ranks)}
    (count,) = slots
    assert capacity - ranks * SLOT - MARGIN < _used(ssd) + catalogue_allowance(count, ranks) <= capacity


def test_ranks_that_start_at_once_agree(ssd: Path) -> None:
    results: dict[int, RankSlab] = {}
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait(60)
        results[number] = open_rank_slab(ssd, "model", number, LAYOUT, SLOT, 4 * CAPACITY, 4, patience_s=0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({results[number].slots for number in range(4)}) == 1
    for slab in results.values():
        slab.close()


def test_a_second_start_gets_the_same_slots_and_finds_its_bytes(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    first = rank()
    first.slab.write_from(5, b"kept")
    leader = NamespaceFolder(ssd, "model")
    leader.open()
    catalogue = leader.catalogue(LAYOUT, LAYOUT, 1, first.slots, SLOT)
    catalogue.open()
    catalogue.record([CatalogueRow(b"key", 5, 4, bytes(16))])
    catalogue.close()
    leader.close()
    first.close()
    second = rank()
    assert second.slots == first.slots
    target = bytearray(4)
    second.slab.read_into(5, target)
    assert target == b"kept"


def test_a_second_engine_on_the_same_namespace_is_told_who_holds_it(rank: Callable[..., RankSlab]) -> None:
    first = rank()
    first.slab.write_from(0, b"mine")
    with pytest.raises(TierUnavailable, match=f"in use by process {os.getpid()}.*SSD folder of its own"):
        rank(capacity=2 * CAPACITY)
    assert first.slab.path.stat().st_size == first.slab.nbytes
    first.close()
    rank()


def test_a_second_leader_is_told_so(ssd: Path) -> None:
    first, second = NamespaceFolder(ssd, "model"), NamespaceFolder(ssd, "model")
    first.open()
    with pytest.raises(TierUnavailable, match=f"process {os.getpid()}"):
        second.open(patience_s=0)
    first.close()
    first.close()
    second.open(patience_s=0)
    second.close()


def test_a_killed_engine_gives_its_folder_back(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    script = """
        import sys
        from umbp_connectors.pool.folder import open_rank_slab
        slab = open_rank_slab(sys.argv[1], "model", 0, b"\\x11" * 32, 65536, 4 << 20)
        print("open", flush=True)
        sys.stdin.read()
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(ssd)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(TierUnavailable, match=f"process {child.pid}"):
            rank()
        child.send_signal(signal.SIGKILL)
    rank()


def test_a_folder_that_becomes_free_soon_is_waited_for(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    first = rank()
    opened: list[RankSlab] = []
    waits = threading.Event()

    def start() -> None:
        waits.set()
        opened.append(open_rank_slab(ssd, "model", 0, LAYOUT, SLOT, CAPACITY, patience_s=60))

    starter = threading.Thread(target=start)
    starter.start()
    assert waits.wait(60)
    first.close()
    starter.join(60)
    assert opened
    opened[0].close()


def test_what_another_namespace_left_stays_while_half_is_free(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    old = rank("old", capacity=CAPACITY // 2)
    old.slab.write_from(0, b"kept")
    old.close()
    new = rank("new")
    assert old.slab.path.exists()
    assert _used(ssd) + catalogue_allowance(new.slots, 1) <= CAPACITY


def test_the_least_recently_used_namespaces_go_first(
    ssd: Path, rank: Callable[..., RankSlab], caplog: pytest.LogCaptureFixture
) -> None:
    homes = []
    for age, name in enumerate(("a", "b", "c")):
        rank(name, capacity=(age + 1) * (3 << 19)).close()
        homes.append(namespace_dir(ssd, name))
    for age, home in ((2, homes[0]), (1, homes[1]), (3, homes[2])):
        for path in home.rglob("*"):
            os.utime(path, (age, age))
    sizes = [sum(path.stat().st_size for path in home.rglob("*.bin")) for home in homes]
    with caplog.at_level(logging.WARNING):
        new = rank("new", capacity=2 * (sizes[2] + sizes[0]) + 8192)
    assert [home.exists() for home in homes] == [True, False, True]
    assert str(homes[1]) in caplog.text
    assert _used(ssd) + catalogue_allowance(new.slots, 1) <= 2 * (sizes[2] + sizes[0]) + 8192


def test_a_running_engine_is_never_removed_and_counts_for_what_it_claimed(
    ssd: Path, rank: Callable[..., RankSlab]
) -> None:
    # Only one of two ranks is there yet, but the other's share is spoken for.
    running = rank("running", capacity=CAPACITY, ranks=2)
    with pytest.raises(TierUnavailable, match="has no room"):
        rank("late", capacity=CAPACITY)
    assert running.slab.path.exists()
    late = rank("late", capacity=2 * CAPACITY)
    second = rank("running", number=1, capacity=CAPACITY, ranks=2)
    assert second.slots == running.slots
    assert _used(ssd) + catalogue_allowance(late.slots, 1) + catalogue_allowance(second.slots, 2) <= 2 * CAPACITY


def test_a_stale_layout_stays_while_half_is_free(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    small = rank(layout=OTHER, capacity=CAPACITY // 2)
    small.close()
    new = rank()
    assert small.slab.path.exists()
    assert _used(ssd) + catalogue_allowance(new.slots, 1) <= CAPACITY


def test_a_stale_layout_that_takes_more_than_half_goes(
    ssd: Path, rank: Callable[..., RankSlab], caplog: pytest.LogCaptureFixture
) -> None:
    large = rank(layout=OTHER)
    large.close()
    with caplog.at_level(logging.WARNING):
        new = rank()
    assert not large.slab.path.exists()
    assert new.slots == large.slots
    assert "to make room" in caplog.text


def test_ranks_that_are_no_more_count_and_go(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    for number in range(4):
        rank(number=number, ranks=4, capacity=2 * CAPACITY).close()
    again = rank(ranks=1, capacity=2 * CAPACITY)
    assert _used(ssd) + catalogue_allowance(again.slots, 1) <= 2 * CAPACITY
    assert len(list(namespace_dir(ssd, "model").glob("rank*"))) < 4


@pytest.mark.parametrize("engines", [2, 4])
def test_engines_of_a_group_share_the_capacity_and_keep_it_over_restarts(ssd: Path, engines: int) -> None:
    """Whoever comes first takes its part and no more, and none of them removes another's folder."""
    capacity = engines * 2 * CAPACITY
    for _life in range(2):
        slabs = [
            open_rank_slab(ssd, f"model-dp{number}", 0, LAYOUT, SLOT, capacity, engines=engines, patience_s=0)
            for number in range(engines)
        ]
        assert len({slab.slots for slab in slabs}) == 1
        assert slabs[0].slots > 0
        assert _used(ssd) + sum(catalogue_allowance(slab.slots, 1) for slab in slabs) <= capacity
        for slab in reversed(slabs):
            slab.close()
    assert len(list(ssd.glob("*/rank0/slab-*.bin"))) == engines


def test_foreign_files_are_neither_touched_nor_counted(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    expected = plan_capacity(ssd.parent, "model", 0, LAYOUT, SLOT, CAPACITY).slots
    home = namespace_dir(ssd, "model")
    foreign = [
        ssd / "photo.jpg",
        ssd / "0123456789abcdef" / "slab-111111111111.bin",
        ssd / "backup" / "identity.json",
        home / "notes.txt",
        home / "rank0" / "slab-mine.bin",
        home / "rank9x" / "slab-111111111111.bin",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"precious" * 100000)
    link = ssd / "fedcba9876543210"
    link.symlink_to(ssd.parent)
    opened = rank()
    assert opened.slots == expected
    assert all(path.read_bytes() == b"precious" * 100000 for path in foreign)
    assert link.is_symlink()


def test_removing_a_namespace_leaves_foreign_files_in_it(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    old = rank("old")
    old.close()
    note = namespace_dir(ssd, "old") / "note.txt"
    note.write_text("keep me")
    rank("new")
    assert not old.slab.path.exists()
    assert note.read_text() == "keep me"


def _below_a_file(root: Path) -> Path:
    (root / "file").write_text("x")
    return root / "file" / "ssd"


def _a_file(root: Path) -> Path:
    (root / "file").write_text("x")
    return root / "file"


def _read_only(root: Path) -> Path:
    return Path("/proc/self/ssd")


def _slab_is_a_folder(root: Path) -> Path:
    slab_path(root, "model", 0, LAYOUT).mkdir(parents=True)
    return root


def _rank_is_a_file(root: Path) -> Path:
    home = namespace_dir(root, "model")
    home.mkdir()
    (home / "rank0").write_text("x")
    return root


@pytest.mark.parametrize("spoil", [_below_a_file, _a_file, _read_only, _slab_is_a_folder, _rank_is_a_file])
def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path: Path, spoil: Callable[[Path], Path]) -> None:
    ssd = spoil(tmp_path)
    with pytest.raises(TierUnavailable) as caught:
        open_rank_slab(ssd, "model", 0, LAYOUT, SLOT, CAPACITY, patience_s=0)
    assert str(ssd) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", [_below_a_file, _a_file, _read_only])
def test_the_leader_says_the_same(tmp_path: Path, spoil: Callable[[Path], Path]) -> None:
    with pytest.raises(TierUnavailable, match="cannot be used"):
        NamespaceFolder(spoil(tmp_path), "model").open()


def test_a_failed_start_leaves_the_folder_free(ssd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TierUnavailable, match="No space left"):
            open_rank_slab(ssd, "model", 0, LAYOUT, SLOT, CAPACITY, patience_s=0)
    open_rank_slab(ssd, "model", 0, LAYOUT, SLOT, CAPACITY, patience_s=0).close()


def test_a_disk_that_is_full_by_now_does_not_hide_what_was_stored(
    rank: Callable[..., RankSlab], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rank()
    first.slab.write_from(5, b"kept")
    first.close()

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        patch.setattr(Path, "write_text", full)
        again = rank()
        with pytest.raises(TierUnavailable, match="No space left"):
            rank("another")
    target = bytearray(4)
    again.slab.read_into(5, target)
    assert target == b"kept"


@pytest.mark.parametrize("capacity", [0, SLOT, (1 << 20) + SLOT])
def test_no_room_for_one_object(rank: Callable[..., RankSlab], capacity: int) -> None:
    with pytest.raises(TierUnavailable, match="no room for one object"):
        rank(capacity=capacity)


def test_a_spoilt_identity_is_no_obstacle(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    rank().close()
    for text in ("", "{", "[]", '{"format": 3}'):
        (namespace_dir(ssd, "model") / "identity.json").write_text(text)
        opened = rank()
        assert opened.slots > 0
        opened.close()
    (namespace_dir(ssd, "model") / "identity.json").write_text("{")
    other = rank("other")
    assert other.slots > 0
    other.close()


def test_planning_changes_nothing(ssd: Path, rank: Callable[..., RankSlab]) -> None:
    rank("old").close()
    before = sorted((path, path.stat().st_mtime_ns) for path in ssd.rglob("*"))
    first = plan_capacity(ssd, "new", 0, LAYOUT, SLOT, CAPACITY)
    assert first == plan_capacity(ssd, "new", 0, LAYOUT, SLOT, CAPACITY)
    assert [unit.path for unit in first.remove] == [namespace_dir(ssd, "old")]
    assert before == sorted((path, path.stat().st_mtime_ns) for path in ssd.rglob("*"))


def test_a_folder_is_made_and_tried_without_waiting_for_anybody(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    try_folder(folder)
    busy = FolderLock(folder, "umbp.lock")
    busy.acquire()
    try_folder(folder)
    busy.release()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierUnavailable, match=r"the SSD folder .*/file cannot be used \(File exists\)"):
        try_folder(tmp_path / "file")


def test_a_lock_is_idempotent_and_waits_when_asked(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    first.acquire()
    assert first.held
    waiter = threading.Thread(target=second.acquire, kwargs={"wait": True})
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    first.release()
    first.release()
    waiter.join(60)
    assert second.held
    assert not first.held
    second.release()


_FORKING = textwrap.dedent(
    """
    import os, sys
    from umbp_connectors.pool.folder import FolderInUse, FolderLock

    lock, other = FolderLock(sys.argv[1]), FolderLock(sys.argv[1])
    lock.acquire()
    (told, tell), (end, ends) = os.pipe(), os.pipe()
    for releases in (True, False):
        if os.fork() == 0:
            os.close(ends)
            if releases:
                lock.release()
            os.write(tell, b"x")
            os.read(end, 1)
            os._exit(0)
        os.read(told, 1)
    try:
        other.acquire()
    except FolderInUse:
        print("held")
    lock.release()
    other.acquire()
    print("free")
    """
)


def test_who_was_forked_meanwhile_neither_gives_a_lock_back_nor_keeps_it(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, "-c", _FORKING, str(tmp_path)]
    said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=env)
    assert said.stdout.split() == ["held", "free"], said.stderr
