"""What a local pool finds again after a clean stop and after a kill at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbp_connectors.pool.catalogue_file import CatalogueFile
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig
from umbp_core.ids import Identity, RankScope

SIZE = 32 << 10
IDENTITY = Identity("model", b"\x11" * 32, RankScope())

SCRIPT = """
    import sys
    from pathlib import Path
    import numpy as np
    from umbp_connectors.pool.local import LocalPool, LocalPoolConfig
    from umbp_core.ids import Identity, RankScope

    size, slots = 32 << 10, int(sys.argv[2])
    config = LocalPoolConfig(size, 16 * size, Path(sys.argv[1]), (1 << 20) + slots * (size + 768))
    pool = LocalPool(Identity("model", b"\\x11" * 32, RankScope()), config)
    pool.open()

    def put(first, count):
        keys = [b"key%033d" % index for index in range(first, first + count)]
        pool.put(keys, [np.full(size // 8, index * 7 + 1, dtype=np.uint64) for index in range(first, first + count)])

    put(0, 12)
    assert pool.flush(60)
    print("flushed", flush=True)
    first = 12
    while True:
        put(first, 12)
        first += 12
        if first > 100:
            print("churned", flush=True)
"""


def _config(ssd: Path, slots: int) -> LocalPoolConfig:
    return LocalPoolConfig(SIZE, 16 * SIZE, ssd, (1 << 20) + slots * (SIZE + 768))


def _expected(index: int) -> np.ndarray:
    return np.full(SIZE // 8, index * 7 + 1, dtype=np.uint64).view(np.uint8)


def _kill_when(ssd: Path, slots: int, word: bytes) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(ssd), str(slots)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        while child.stdout.readline().strip() != word:
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)


def _serve(ssd: Path, slots: int, count: int) -> list[GetStatus]:
    """Open a pool on what is there, read everything it says it has, and compare every byte."""
    pool = LocalPool(IDENTITY, _config(ssd, slots))
    pool.open()
    keys = [b"key%033d" % index for index in range(count)]
    claimed = pool.exists(keys)
    buffers = [np.zeros(SIZE, dtype=np.uint8) for _ in keys]
    statuses = pool.get(keys, buffers)
    for index, status in enumerate(statuses):
        assert status is GetStatus.MISS or claimed[index]
        if status.hit:
            assert np.array_equal(buffers[index], _expected(index))
    pool.close()
    return statuses


def test_a_kill_after_a_flush_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    _kill_when(tmp_path, 2000, b"flushed")
    assert _serve(tmp_path, 2000, 12) == [GetStatus.SSD] * 12


@pytest.mark.parametrize("slots", [20, 60])
@pytest.mark.statement("connector", 80)
def test_a_kill_while_slots_are_being_reused_never_serves_wrong_bytes(tmp_path: Path, slots: int) -> None:
    claimed = lives = 0
    while claimed < 2 and lives < 20:
        _kill_when(tmp_path, slots, b"churned")
        claimed += any(status is not GetStatus.MISS for status in _serve(tmp_path, slots, 4000))
        lives += 1
    assert claimed == 2, "where nothing is claimed, nothing is tried"


def test_a_kill_leaves_the_bounds_intact(tmp_path: Path) -> None:
    _kill_when(tmp_path, 60, b"churned")
    _serve(tmp_path, 60, 100)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert used <= (1 << 20) + 60 * (SIZE + 768)


def test_a_clean_stop_keeps_what_was_put_last(tmp_path: Path) -> None:
    pool = LocalPool(IDENTITY, _config(tmp_path, 60))
    pool.open()
    keys = [b"key%033d" % index for index in range(10)]
    pool.put(keys, [_expected(index) for index in range(10)])
    pool.close(60)
    assert _serve(tmp_path, 60, 10) == [GetStatus.SSD] * 10


@pytest.mark.statement("connector", 80)
def test_a_corrupt_catalogue_is_an_empty_start(tmp_path: Path) -> None:
    pool = LocalPool(IDENTITY, _config(tmp_path, 60))
    pool.open()
    pool.put([b"key%033d" % 0], [_expected(0)])
    pool.close()
    (catalogue,) = tmp_path.rglob("catalogue-*.sqlite")
    catalogue.write_bytes(os.urandom(9000))
    assert _serve(tmp_path, 60, 1) == [GetStatus.MISS]
    assert list(tmp_path.rglob("*.corrupt-0"))


def test_a_lost_slab_costs_hits_only(tmp_path: Path) -> None:
    pool = LocalPool(IDENTITY, _config(tmp_path, 60))
    pool.open()
    pool.put([b"key%033d" % index for index in range(5)], [_expected(index) for index in range(5)])
    pool.close()
    (slab,) = tmp_path.rglob("slab-*.bin")
    slab.unlink()
    for _ in range(2):
        assert _serve(tmp_path, 60, 5) == [GetStatus.MISS] * 5


def test_a_slab_of_another_layout_that_made_room_is_not_promised_any_more(tmp_path: Path) -> None:
    keys = [b"key%033d" % index for index in range(5)]
    other = Identity(IDENTITY.namespace, b"\x22" * 32, IDENTITY.rank)
    for identity in (IDENTITY, other, IDENTITY):
        pool = LocalPool(identity, _config(tmp_path, 60))
        pool.open()
        assert pool.exists(keys) == [False] * 5
        pool.put(keys, [_expected(index) for index in range(5)])
        pool.close()


def test_a_smaller_capacity_keeps_what_fits(tmp_path: Path) -> None:
    pool = LocalPool(IDENTITY, _config(tmp_path, 60))
    pool.open()
    for start in range(0, 40, 8):
        keys = [b"key%033d" % index for index in range(start, start + 8)]
        pool.put(keys, [_expected(index) for index in range(start, start + 8)])
        assert pool.flush(60)
    pool.close()
    hits = [status.hit for status in _serve(tmp_path, 20, 40)]
    assert sum(hits) == 20


@pytest.mark.parametrize("depth", [-1, 1 << 61, 1 << 64])
def test_what_has_an_odd_depth_is_found_again(tmp_path: Path, depth: int) -> None:
    for status in (GetStatus.DRAM, GetStatus.SSD):
        pool, buffer = LocalPool(IDENTITY, _config(tmp_path, 20)), bytearray(SIZE)
        pool.open()
        if status is GetStatus.DRAM:
            pool.put([b"odd", b"even"], [bytes(SIZE)] * 2, [depth, 2])
            assert pool.flush(60)
        assert pool.get([b"odd", b"even"], [buffer, bytearray(SIZE)]) == [status] * 2
        pool.close()


def test_to_clear_many_objects_is_as_little_work_for_the_disk_as_to_clear_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, count = 4096, 700
    config = LocalPoolConfig(size, 100 * size, tmp_path, (1 << 20) + count * (size + 768))
    keys = [b"%036d" % number for number in range(count)]
    written: list[int] = []

    def transact(file: CatalogueFile, *work: Any) -> None:
        written.extend(len(values) for _, values in work)
        real(file, *work)

    pool, real = LocalPool(IDENTITY, config), CatalogueFile._transact
    pool.open()
    for start in range(0, count, 50):
        pool.put(keys[start : start + 50], [bytes(size)] * 50)
        assert pool.flush(60)
    monkeypatch.setattr(CatalogueFile, "_transact", transact)
    assert pool.clear() > 600
    assert sum(written) == 1
    pool.put(keys[:2], [bytes(size)] * 2)
    pool.close(60)
    pool = LocalPool(IDENTITY, config)
    pool.open()
    assert pool.exists(keys) == [True] * 2 + [False] * (count - 2)
    pool.close()
