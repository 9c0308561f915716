"""What the machine says about its memory, read from made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbp_connectors.pool.machine import MemoryLimits, meminfo, memory_limits


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": "1048576\n",
            "sys/fs/cgroup/memory.max": "4194304\n",
        },
    )
    assert memory_limits(root).cgroup == 1 << 20


def test_cgroup_v1_is_understood_and_its_no_limit_too(tmp_path: Path) -> None:
    line = "9:name=systemd:/\n4:cpu,memory:/box\n"
    limit = "sys/fs/cgroup/memory/box/memory.limit_in_bytes"
    assert memory_limits(_tree(tmp_path / "a", {"proc/self/cgroup": line, limit: "2097152\n"})).cgroup == 2 << 20
    huge = str(9223372036854771712)
    assert memory_limits(_tree(tmp_path / "b", {"proc/self/cgroup": line, limit: huge})).cgroup is None


def test_without_cgroups_physical_memory_is_the_limit(tmp_path: Path) -> None:
    limits = memory_limits(tmp_path)
    assert limits.cgroup is None
    assert limits.usable == limits.physical > 0


def test_the_smaller_of_both_is_usable() -> None:
    assert MemoryLimits(10, 4).usable == 4
    assert MemoryLimits(10, 40).usable == 10


@pytest.mark.parametrize(("field", "value"), [("MemAvailable", 2048), ("HugePages_Free", 3072), ("Nothing", 0)])
def test_meminfo_fields(tmp_path: Path, field: str, value: int) -> None:
    root = _tree(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2 kB\nHugePages_Free:   3\n"})
    assert meminfo(field, root) == value
