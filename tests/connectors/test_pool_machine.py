"""What the machine says about its memory, read from made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbp_connectors.pool.machine import MemoryLimits, meminfo, memory_limits, memory_to_spare


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


V2 = "sys/fs/cgroup/pod"
V1 = "sys/fs/cgroup/memory/box"


@pytest.mark.parametrize(
    ("files", "spare"),
    [
        ({}, 64 << 10),
        ({"proc/self/cgroup": "0::/pod\n", f"{V2}/memory.max": "max\n", f"{V2}/memory.current": "9999\n"}, 64 << 10),
        ({"proc/self/cgroup": "0::/pod\n", f"{V2}/memory.max": "5000\n", f"{V2}/memory.current": "2000\n"}, 3000),
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                f"{V2}/box/memory.max": "90000\n",
                f"{V2}/box/memory.current": "1000\n",
                f"{V2}/memory.max": "5000\n",
                f"{V2}/memory.current": "4900\n",
                f"{V2}/memory.stat": "anon 9\ninactive_file 700\nactive_file 50\n",
            },
            800,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/box\n",
                f"{V1}/memory.limit_in_bytes": "5000\n",
                f"{V1}/memory.usage_in_bytes": "4000\n",
                f"{V1}/memory.stat": "inactive_file 1\ntotal_inactive_file 30\n",
            },
            1030,
        ),
    ],
)
def test_what_can_be_taken_minds_the_container(tmp_path: Path, files: dict[str, str], spare: int) -> None:
    root = _tree(tmp_path, {"proc/meminfo": "MemAvailable:  64 kB\n", **files})
    assert memory_to_spare(root) == spare
