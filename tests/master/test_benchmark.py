"""The benchmark of the master works on what the master is now; its figures are not judged here."""

import importlib
import json
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the benchmark measures both protocols")
pytest.importorskip("uvloop", reason="the floor is measured with it")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> Iterator[types.ModuleType]:
    """benchmarks/master.py, whose modules import each other as a script's do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        folders = [ROOT, ROOT / "core"]
        patch.setenv("PYTHONPATH", ":".join(map(str, folders)))
        module = importlib.import_module("master")
        patch.setattr(module.master_changes, "WATCHED", 0.05)
        yield module


def test_sections_of_one_master(bench: types.ModuleType) -> None:
    matches, changes = bench.master_matches, bench.master_changes
    with bench.master() as running:
        held = matches.load(running, 8 * 2200)
        rows = matches.match(running, held, 8)
        assert [(row["hashes"], row["kind"]) for row in rows] == [
            (length, kind) for length in (1, 128, 2048) for kind in matches.KINDS
        ]
        assert all(row[f"{door}: p50 us"] > 0 for row in rows for door in ("native", "native, TCP", "gRPC"))
        placed = bench.master_placed.placed(running, held, 8)
        assert [row["processors"] for row in placed] == ["one for both", "one each"]
        assert all(row["match of 128, p50 us"] > 0 for row in placed)
        assert all(row["matches/s"] > 0 for row in matches.pipelined(running, held, 0.01))
        assert len(matches.spread(running, 2)) == 6
        assert len(matches.prefix(running, 2)) == 3
    with bench.master() as running:
        held, memory = changes.million(running, 4000)
        assert [row["on"] for row in memory] == ["one tier", "a second tier more"]
        stalls = changes.stalls(running, held)
        assert len(stalls) == 8
        assert all(row["longest match ms, best of 3"] > 0 for row in stalls)


def test_verdicts_compare_with_the_targets(bench: types.ModuleType) -> None:
    def sections(us: float, rate: float) -> dict[str, list[dict[str, object]]]:
        return {
            bench.MATCH: [
                {"hashes": length, "kind": "hit", "native: p50 us": us, "gRPC: p50 us": us} for length in (1, 128, 2048)
            ],
            bench.SPREAD: [{"hashes": 2048, "native: p50 us": us}],
            bench.STALLS: [
                {"revoked": "nothing else happens", "longest match ms, best of 3": 99.0},
                {"revoked": "a node", "longest match ms, best of 3": us},
            ],
            bench.MEMORY: [{"on": "one tier", "resident bytes a hash": us}],
            bench.PIPELINED: [{"hashes": 128, "matches/s": rate}],
            bench.REPORT: [{"blocks a call": 2048, "native": rate}],
        }

    assert {row[""] for row in bench.verdicts(sections(us=1.0, rate=1e9))} == {"met"}
    assert {row[""] for row in bench.verdicts(sections(us=1e9, rate=0.1))} == {"missed"}


def test_published_targets_follow_from_the_published_figures(bench: types.ModuleType) -> None:
    """The match of 128 among them is the one of two processes that the scheduler places, not one held to processors."""
    results = json.loads((ROOT / "benchmarks/results/master.json").read_text(encoding="utf-8"))["sections"]
    [plain] = [row["native: p50 us"] for row in results[bench.MATCH] if (row["hashes"], row["kind"]) == (128, "hit")]
    judged = {row["what"]: row["ours"] for row in results[bench.TARGETS]}
    assert judged["match of 128, native, p50 us"] == plain
    assert bench.verdicts(results) == results[bench.TARGETS]
