"""``umbp doctor``: each finding against a made-up machine or environment."""

import json
import resource
import stat
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from umbp_connectors.config import UmbpConfig
from umbp_connectors.doctor import Finding, Status, engines, examine, machine

GIB = 1 << 30


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def made_up(root: Path, *, available_gib: int = 64, limit_gib: int | None = None, huge_free: int = 0) -> Path:
    """A root folder with the files that describe a machine."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemAvailable: {available_gib << 20} kB\nHugePages_Free: {huge_free}\nHugepagesize: 2048 kB\n",
        encoding="ascii",
    )
    (root / "proc/self/cgroup").write_text("0::/box\n", encoding="ascii")
    if limit_gib is not None:
        (root / "sys/fs/cgroup/box").mkdir(parents=True)
        (root / "sys/fs/cgroup/box/memory.max").write_text(str(limit_gib << 30), encoding="ascii")
    for node in (0, 1):
        (root / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("wanted_gib", "limit_gib", "available_gib", "status"),
    [(1, 4, 64, Status.OK), (5, 4, 64, Status.PROBLEM), (3, 4, 2, Status.WARNING), (1 << 20, None, 64, Status.PROBLEM)],
)
def test_memory(tmp_path: Path, wanted_gib: int, limit_gib: int | None, available_gib: int, status: Status) -> None:
    root = made_up(tmp_path, available_gib=available_gib, limit_gib=limit_gib)
    finding = only(machine.memory(UmbpConfig(dram_capacity=wanted_gib * GIB), root))
    assert finding.status is status
    assert bool(finding.advice) is (status is not Status.OK)


@pytest.mark.parametrize(
    ("limit", "status"), [(resource.RLIM_INFINITY, Status.OK), (8 * GIB, Status.OK), (8 << 20, Status.NOTE)]
)
def test_locked_memory(limit: int, status: Status) -> None:
    finding = only(machine.locked_memory(UmbpConfig(), limit))
    assert finding.status is status
    assert ("memlock=-1" in finding.advice) is (status is Status.NOTE)


@pytest.mark.parametrize(("asked", "free", "status"), [(False, 0, "ok"), (True, 2048, "ok"), (True, 2047, "warning")])
def test_huge_pages(tmp_path: Path, asked: bool, free: int, status: str) -> None:
    finding = only(machine.huge_pages(UmbpConfig(dram_use_hugepages=asked), made_up(tmp_path, huge_free=free)))
    assert finding.status.value == status
    assert ("nr_hugepages=2048" in finding.advice) is (status == "warning")


@pytest.mark.parametrize(("node", "status"), [(-1, "ok"), (1, "ok"), (2, "problem")])
def test_numa(tmp_path: Path, node: int, status: str) -> None:
    assert only(machine.numa(UmbpConfig(dram_numa_node=node), made_up(tmp_path))).status.value == status


def test_ssd_tier_that_is_off() -> None:
    assert only(machine.ssd(UmbpConfig())).status is Status.NOTE


def test_ssd_folder_need_not_exist_yet_and_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    finding = only(machine.ssd(UmbpConfig(ssd_dir=folder, ssd_capacity=1 << 20)))
    assert finding.status in (Status.OK, Status.WARNING)
    assert not folder.parent.exists()


def test_ssd_capacity_larger_than_the_disk(tmp_path: Path) -> None:
    finding = only(machine.ssd(UmbpConfig(ssd_dir=tmp_path, ssd_capacity=1 << 60)))
    assert finding.status is Status.PROBLEM
    assert "set ssd_capacity to at most" in finding.advice


def test_ssd_folder_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert only(machine.ssd(UmbpConfig(ssd_dir=path / "below"))).status is Status.PROBLEM


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("0.28.0", "ok"),
        ("0.32.0+cpu", "ok"),
        ("0.33.1rc1", "ok"),
        ("0.27.1", "warning"),
        ("0.34.0", "warning"),
        ("1.0.0", "warning"),
        ("unknown", "warning"),
    ],
)
def test_vllm_version(text: str, status: str) -> None:
    finding = engines.vllm_version(text)
    assert finding.status.value == status
    assert text in finding.found


@pytest.mark.parametrize("group", sorted(engines.ENTRY_POINTS))
@pytest.mark.parametrize(
    ("installed", "allowed", "status", "advice"),
    [
        (None, None, "ok", ""),
        (None, "other,umbp", "ok", ""),
        (None, "other", "problem", "add umbp to "),
        ("somebody_else:register", None, "problem", "reinstall"),
        ("", None, "problem", "pip install umbp-connectors"),
    ],
)
def test_entry_points(
    monkeypatch: pytest.MonkeyPatch, group: str, installed: str | None, allowed: str | None, status: str, advice: str
) -> None:
    value = engines.ENTRY_POINTS[group] if installed is None else installed
    entries = [EntryPoint("umbp", value, group)] if value else []
    monkeypatch.setattr(engines, "entry_points", lambda group: [EntryPoint("other", "x", group), *entries])
    variable = "SGLANG_PLUGINS" if group == "sglang.srt.plugins" else "VLLM_PLUGINS"
    finding = only(engines.registered(group, {} if allowed is None else {variable: allowed}))
    assert finding.status.value == status
    assert advice in finding.advice


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_probe_passes_on_each_answer(tmp_path: Path) -> None:
    off = {"live": False, "found": "off", "advice": "do x"}
    answers = json.dumps({"--kv-connector": off, "b": {"live": True, "found": "y", "advice": ""}})
    python = fake_python(tmp_path, f"echo noise; echo '{answers}'")
    assert list(engines.probe({}, python)) == [
        Finding("--kv-connector", Status.PROBLEM, "off", "do x"),
        Finding("b", Status.OK, "y"),
    ]


def test_each_engine_is_asked_by_its_own_module(tmp_path: Path) -> None:
    python = fake_python(tmp_path, """printf '{"%s": {"live": true, "found": "x", "advice": ""}}' "$2" """)
    for adapter in (engines.VLLM, engines.SGLANG):
        assert only(engines.probe({}, python, adapter)) == Finding(adapter.module, Status.OK, "x")


def test_probe_that_fails_or_hangs_is_a_problem(tmp_path: Path) -> None:
    failed = only(engines.probe({}, fake_python(tmp_path, "echo 'ImportError: libcuda' >&2; exit 1")))
    assert failed.status is Status.PROBLEM
    assert "libcuda" in failed.found
    silent = only(engines.probe({}, fake_python(tmp_path, "exit 0")))
    assert silent.status is Status.PROBLEM
    hanging = only(engines.probe({}, fake_python(tmp_path, "exec sleep 60"), timeout_s=0.2))
    assert "no answer" in hanging.found


@pytest.mark.parametrize(
    ("seed", "version", "status"),
    [
        (None, "0.32.0", "ok"),
        (None, "0.28.3", "problem"),
        ("0", "0.28.3", "ok"),
        ("42", "0.32.0", "ok"),
        ("random", "0.32.0", "problem"),
    ],
)
def test_hashes(monkeypatch: pytest.MonkeyPatch, seed: str | None, version: str, status: str) -> None:
    monkeypatch.setattr(engines, "version", lambda name: version)
    finding = only(engines.hashes({} if seed is None else {"PYTHONHASHSEED": seed}))
    assert finding.status.value == status
    assert ("PYTHONHASHSEED=0" in finding.advice) is (status == "problem")


def test_examination_covers_everything_and_survives_a_bad_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    findings = {finding.topic: finding for finding in examine({"dram_capcity": 1}, {})}
    assert findings["configuration"].status is Status.PROBLEM
    assert "did you mean 'dram_capacity'?" in findings["configuration"].found
    assert findings["engines"].status is Status.PROBLEM
    topics = {"plug-ins", "memory", "locked memory", "huge pages", "NUMA", "SSD tier", "block hashes", "vLLM", "SGLang"}
    assert topics | {"master"} <= set(findings)


def test_examination_names_the_keys_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    findings = {finding.topic: finding for finding in examine({"io_threads": 2}, {"UMBP_LOG_LEVEL": "debug"})}
    assert findings["configuration"].found == "set: io_threads, log_level"


def test_engine_that_is_installed_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    monkeypatch.setattr(engines, "version", lambda name: "0.32.0")
    asked = []
    monkeypatch.setattr(engines, "probe", lambda env, python, *adapter: asked.append((python, *adapter)) or iter([]))
    findings = list(examine({}, {}))
    assert asked == [(sys.executable,), (sys.executable, engines.SGLANG)]
    assert not [finding for finding in findings if finding.topic == "engines"]


@pytest.mark.parametrize(("text", "status"), [("0.5.23", "ok"), ("0.6.0", "warning"), ("unknown", "warning")])
def test_sglang_version(text: str, status: str) -> None:
    finding = engines.sglang_version(text)
    assert finding.status.value == status
    assert text in finding.found
