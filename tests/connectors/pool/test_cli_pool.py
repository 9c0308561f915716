"""``umbp pool``: what lies in an SSD folder, beside a running engine and without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.commands import umbp
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_core.ids import Identity, RankScope

SIZE = 16 << 10
CAPACITY = (1 << 20) + 40 * (SIZE + 768)
IDENTITY = Identity("model", b"\x11" * 32, RankScope())
KEYS = [b"key %02d" % number for number in range(12)]

ENGINE = """
    import sys
    from pathlib import Path
    from umbp_connectors.pool.local import LocalPool, LocalPoolConfig
    from umbp_core.ids import Identity, RankScope

    size = 16 << 10
    config = LocalPoolConfig(size, 20 * size, Path(sys.argv[1]), (1 << 20) + 40 * (size + 768))
    pool = LocalPool(Identity("model", b"\\x11" * 32, RankScope()), config)
    pool.open()
    first = 0
    for line in sys.stdin:
        keys = [b"engine %06d" % number for number in range(first, first + 10)]
        first += 10
        pool.put(keys, [(key * size)[:size] for key in keys])
        pool.flush(30)
        print("stored", flush=True)
    pool.close()
"""

Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command on the folder; its exit code, and what it says, as a value when it was asked for JSON."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str, folder: Path = tmp_path) -> tuple[int, Any]:
        where = [] if "bench" in arguments else ["--dir", str(folder)]
        return umbp(monkeypatch, capsys, "pool", *arguments, *where)

    return run


def object_of(key: bytes, nbytes: int = SIZE) -> bytes:
    return (key * nbytes)[:nbytes]


def open_pool(folder: Path, identity: Identity = IDENTITY) -> LocalPool:
    pool = LocalPool(identity, LocalPoolConfig(SIZE, 20 * SIZE, folder, CAPACITY, prefault=False, patience_s=0))
    pool.open()
    return pool


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with all ``KEYS``, the last two smaller, that no engine uses."""
    with closing(open_pool(tmp_path)) as pool:
        sizes = [SIZE] * 10 + [100] * 2
        objects = [object_of(key, nbytes) for key, nbytes in zip(KEYS, sizes, strict=True)]
        assert pool.put(KEYS, objects, list(range(12))) == [PutStatus.STORED] * 12
        assert pool.flush(30)
    return tmp_path


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A process that uses the folder; stores ten more objects when it is called."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    script = "\n".join(line[4:] for line in ENGINE.splitlines())
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def store() -> None:
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"stored\n"

        yield store
        child.stdin.close()


def test_stats_of_a_folder(run: Run, stored: Path) -> None:
    code, told = run("stats", "--json")
    (row,) = told["catalogues"]
    assert (code, told["unreadable"]) == (0, [])
    assert (row["namespace"], row["objects"], row["bytes"]) == ("model", 12, 10 * SIZE + 200)
    assert (row["slot_bytes"], row["ranks"], row["in_use"]) == (SIZE, 1, False)
    assert 12 <= row["slots"] <= 40
    assert row["fill"] == pytest.approx((10 * SIZE + 200) / (12 * SIZE))
    assert row["file_bytes"] <= CAPACITY
    code, text = run("stats")
    assert code == 0
    assert "model" in text
    assert run("stats", "--json", "--name", "other")[1]["catalogues"] == []


def test_ls_finds_by_prefix_size_and_age(run: Run, stored: Path) -> None:
    def keys(*arguments: str) -> list[bytes]:
        return sorted(bytes.fromhex(row["key"]) for row in run("ls", "--json", *arguments)[1])

    assert keys() == KEYS
    assert keys("--prefix", "key 0") == KEYS[:10]
    assert keys("--prefix", b"key 1".hex()) == KEYS[10:]
    assert keys("--max-size", "1KiB") == KEYS[10:]
    assert keys("--min-size", "16KiB") == KEYS[:10]
    assert keys("--older-than", "1h") == keys("--newer-than", "0s") == []
    assert keys("--newer-than", "1h", "--older-than", "0s") == KEYS
    assert len(keys("--limit", "3")) == 3
    code, text = run("ls", "--limit", "5")
    assert code == 0
    assert "7 more" in text
    ((one,),) = [run("ls", "--json", "--prefix", "key 05")[1]]
    assert (one["bytes"], one["depth"], one["tier"], one["namespace"]) == (SIZE, 5, "SSD", "model")


def test_get_writes_verified_bytes(run: Run, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "object.bin"
    assert run("get", KEYS[11].hex(), "-o", str(out))[0] == 0
    assert out.read_bytes() == object_of(KEYS[11], 100)
    code, text = run("get", b"nothing".hex(), "-o", str(out))
    assert code == 2
    assert "no catalogue has" in text
    assert run("get", "not a key", "-o", str(out))[0] == 2


def test_a_rank_that_is_not_there_is_told_which_are(run: Run, stored: Path, tmp_path: Path) -> None:
    code, said = run("get", KEYS[11].hex(), "--rank", "3", "-o", str(tmp_path / "object.bin"))
    assert code == 2
    assert said.endswith(" has no rank 3: it has rank 0 alone\n")
    assert not (tmp_path / "object.bin").exists()


def test_verify_names_what_is_not_what_was_stored(run: Run, stored: Path) -> None:
    assert run("verify")[0] == 0
    rows = {bytes.fromhex(row["key"]): row["slot"] for row in run("ls", "--json")[1]}
    (slab,) = stored.rglob("slab-*.bin")
    content = np.memmap(slab, dtype=np.uint8, mode="r+")
    content[rows[KEYS[3]] * SIZE + 77] ^= 1
    content.flush()
    code, told = run("verify", "--json")
    (problem,) = told["catalogues"][0]["problems"]
    assert code == 1
    assert KEYS[3].hex() in problem
    code, text = run("get", KEYS[3].hex(), "-o", str(stored / "bad.bin"))
    assert code == 2
    assert "not those that were stored" in text
    assert not (stored / "bad.bin").exists()
    with closing(open_pool(stored)) as pool:
        assert pool.get([KEYS[3]], [bytearray(SIZE)]) == [GetStatus.CORRUPT]


def test_a_slab_that_is_gone_or_short_is_a_problem(run: Run, stored: Path) -> None:
    (slab,) = stored.rglob("slab-*.bin")
    os.truncate(slab, 4 * SIZE)
    code, told = run("verify", "--json")
    assert code == 1
    assert told["catalogues"][0]["objects"] == 12
    assert len(told["catalogues"][0]["problems"]) == 8
    slab.unlink()
    code, told = run("verify", "--json")
    assert code == 1
    assert told["catalogues"][0]["unverifiable"] == 12


def test_a_catalogue_that_cannot_be_read_is_named(run: Run, stored: Path) -> None:
    (catalogue,) = stored.rglob("catalogue-*.sqlite")
    catalogue.write_bytes(os.urandom(9000))
    code, told = run("verify", "--json")
    assert code == 1
    assert told["unreadable"] == [str(catalogue)]
    assert str(catalogue) in run("stats")[1]


def test_evicted_objects_are_gone_for_the_next_engine(run: Run, stored: Path) -> None:
    assert run("evict")[0] == 2, "what is to go has to be said"
    assert "2 objects would go" in run("evict", "--prefix", "key 1")[1]
    assert len(run("ls", "--json")[1]) == 12
    assert "2 objects are gone" in run("evict", "--prefix", "key 1", "--yes")[1]
    assert "1 objects are gone" in run("evict", KEYS[0].hex(), "--yes")[1]
    with closing(open_pool(stored)) as pool:
        assert pool.exists(KEYS) == [False, *[True] * 9, False, False]
        assert pool.get(KEYS[1:10], [bytearray(SIZE) for _ in range(9)]) == [GetStatus.SSD] * 9


def test_clear_gives_the_space_back(run: Run, stored: Path) -> None:
    (stored / "precious.txt").write_text("not ours")
    assert "12 objects would go" in run("clear")[1]
    assert run("clear", "--yes")[0] == 0
    assert not list(stored.rglob("slab-*.bin"))
    assert run("stats", "--json")[1]["catalogues"] == []
    assert (stored / "precious.txt").exists()
    with closing(open_pool(stored)) as pool:
        assert not any(pool.exists(KEYS))


def test_clear_of_one_folder_with_two_catalogues(run: Run, stored: Path) -> None:
    with closing(open_pool(stored, replace(IDENTITY, layout=b"\x22" * 32))) as pool:
        assert pool.put(KEYS[:2], [object_of(key) for key in KEYS[:2]]) == [PutStatus.STORED] * 2
        assert pool.flush(30)
    assert len({Path(row["catalogue"]).parent for row in run("stats", "--json")[1]["catalogues"]}) == 1
    assert len(run("stats", "--json")[1]["catalogues"]) == 2
    code, told = run("clear", "--yes")
    assert (code, "are free again" in told) == (0, True), told
    assert run("stats", "--json")[1]["catalogues"] == []
    assert not list(stored.rglob("slab-*.bin"))


def test_beside_a_running_engine_one_may_look_but_not_touch(
    run: Run, engine: Callable[[], None], tmp_path: Path
) -> None:
    for turn in range(1, 7):
        engine()
        (row,) = run("stats", "--json")[1]["catalogues"]
        assert row["in_use"]
        assert row["objects"] == min(10 * turn, row["slots"])
        code, told = run("verify", "--json")
        assert (code, told["catalogues"][0]["problems"]) == (0, [])
    key = run("ls", "--json", "--limit", "1")[1][0]["key"]
    assert run("get", key, "-o", str(tmp_path / "object.bin"))[0] == 0
    assert (tmp_path / "object.bin").read_bytes() == object_of(bytes.fromhex(key))
    for arguments in (["evict", key, "--yes"], ["clear", "--yes"]):
        code, text = run(*arguments)
        assert code == 2
        assert "is in use" in text
    assert key in {row["key"] for row in run("ls", "--json")[1]}


def test_without_a_folder_one_is_told_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, text = run("stats", folder=tmp_path / "missing")
    assert code == 2
    assert "is no folder" in text
    code, said = umbp(monkeypatch, capsys, "pool", "stats")
    assert code == 2
    assert "--dir" in said


def test_the_folder_may_come_from_the_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stored: Path
) -> None:
    monkeypatch.setenv("UMBP_SSD_DIR", str(stored))
    _, said = umbp(monkeypatch, capsys, "pool", "stats", "--json")
    assert said["catalogues"][0]["objects"] == 12


@pytest.mark.parametrize("where", [[], ["--dir"]])
def test_bench_measures_beside_a_ceiling(run: Run, tmp_path: Path, where: list[str]) -> None:
    folder = [*where, str(tmp_path)] if where else []
    arguments = ["bench", "--size", "64KiB", "--objects", "8", "--rounds", "2", "--json", *folder]
    code, rows = run(*arguments)
    assert code == 0
    assert [row["what"].split()[0] for row in rows] == ["DRAM", "DRAM", "exists", *(["SSD"] * 2 if where else [])]
    assert all(row["value"] > 0 for row in rows)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("arguments", [["--older-than", "soon"], ["--min-size", "large"]])
def test_what_is_no_time_or_size_is_said(run: Run, stored: Path, arguments: list[str]) -> None:
    code, text = run("ls", *arguments)
    assert code == 2
    assert arguments[1] in text


def test_a_folder_that_may_not_be_entered_is_said(run: Run, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home,) = (path for path in stored.iterdir() if path.is_dir())
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != home)
    for arguments in (["verify"], ["evict", "--older-than", "0s"], ["evict", "ff", "--yes"], ["clear", "--yes"]):
        code, said = run(*arguments)
        assert code == 1
        assert f"{home} cannot be read" in said
    code, told = run("stats", "--json")
    assert (code, told["unreadable"]) == (0, [str(home)])


def test_what_an_engine_moved_aside_is_not_left_out(run: Run, stored: Path) -> None:
    (catalogue,) = stored.rglob("catalogue-*.sqlite")
    catalogue.with_name(f"{catalogue.name}.corrupt-1").write_bytes(b"moved aside")
    code, said = run("evict", "--older-than", "0s", "--yes")
    assert (code, said.count("\n"), said.endswith(": 12 objects are gone\n")) == (0, 1, True)


def test_keys_that_are_nowhere_are_said_to_be_none(run: Run, stored: Path) -> None:
    code, said = run("evict", "ffff", "--yes")
    assert code == 0
    assert said.endswith(": 0 objects are gone\n")


def test_a_file_that_cannot_be_written_is_one_sentence(run: Run, stored: Path) -> None:
    there = stored / "gone" / "object"
    code, said = run("get", KEYS[0].hex(), "-o", str(there))
    assert (code, said) == (2, f"umbp: [Errno 2] No such file or directory: '{there}'\n")


def test_bench_refuses_what_does_not_fit_the_machine(run: Run) -> None:
    code, said = run("bench", "--size", "100TiB")
    assert code == 2
    assert "do not fit this machine" in said


@pytest.mark.parametrize("arguments", [["verify"], ["evict", "--older-than", "0s"], ["clear"]])
def test_a_folder_without_catalogues_is_said(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    code, said = run(*arguments, "--name", "x")
    assert (code, said) == (
        0,
        f"umbp: there is no catalogue below {tmp_path} whose namespace or path contains 'x'\n",
    )
