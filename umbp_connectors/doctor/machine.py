"""What the machine offers against what the configuration asks for."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.doctor.findings import Finding, Status
from umbp_connectors.pool.machine import meminfo, memory_limits

_VOLATILE = frozenset({"tmpfs", "ramfs"})
_NETWORKED = frozenset({"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p"})


def readable(nbytes: float) -> str:
    """``nbytes`` for a reader."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.0f} MiB"


def memory(config: UmbpConfig, root: Path = Path("/")) -> Iterator[Finding]:
    """Whether the DRAM tier fits."""
    limits = memory_limits(root)
    available = min(meminfo("MemAvailable", root) or limits.usable, limits.usable)
    found = (
        f"{readable(config.dram_capacity)} wanted (dram_capacity); {limits.describe()}, {readable(available)} available"
    )
    if config.dram_capacity > limits.usable:
        yield Finding(
            "memory",
            Status.PROBLEM,
            found,
            f"set dram_capacity to at most {readable(limits.usable * 0.8)}, or raise the limit",
        )
    elif config.dram_capacity > available:
        yield Finding(
            "memory", Status.WARNING, found, "an engine that runs already may have it; if not, lower dram_capacity"
        )
    else:
        yield Finding("memory", Status.OK, found)


def locked_memory(config: UmbpConfig, limit: int | None = None) -> Iterator[Finding]:
    """Whether the DRAM tier may be pinned for a GPU; ``limit`` is RLIMIT_MEMLOCK in bytes."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY or soft >= config.dram_capacity:
        yield Finding("locked memory", Status.OK, "unlimited" if soft == resource.RLIM_INFINITY else readable(soft))
        return
    yield Finding(
        "locked memory",
        Status.NOTE,
        f"{readable(soft)} (RLIMIT_MEMLOCK), less than dram_capacity",
        "matters where a GPU driver or RDMA counts pinned memory: ulimit -l unlimited, LimitMEMLOCK=infinity "
        "in a systemd unit, --ulimit memlock=-1 for a container",
    )


def huge_pages(config: UmbpConfig, root: Path = Path("/")) -> Iterator[Finding]:
    """Whether there are huge pages where they are asked for."""
    size, free = meminfo("Hugepagesize", root), _count("HugePages_Free", root)
    found = f"{free} free of {readable(size)}"
    if not config.dram_use_hugepages:
        yield Finding("huge pages", Status.OK, f"not asked for; {found}")
        return
    wanted = -(-config.dram_capacity // size) if size else 0
    if size and free >= wanted:
        yield Finding("huge pages", Status.OK, found)
    else:
        yield Finding(
            "huge pages",
            Status.WARNING,
            f"{found}, {wanted} wanted; normal pages will be used",
            f"sysctl vm.nr_hugepages={wanted} (early after boot), or leave dram_use_hugepages out",
        )


def numa(config: UmbpConfig, root: Path = Path("/")) -> Iterator[Finding]:
    """Whether the NUMA node that is asked for exists."""
    nodes = sorted(int(path.name[4:]) for path in (root / "sys/devices/system/node").glob("node[0-9]*"))
    found = f"{max(len(nodes), 1)} node(s)"
    if config.dram_numa_node in (-1, *nodes):
        yield Finding("NUMA", Status.OK, found)
    else:
        yield Finding(
            "NUMA",
            Status.PROBLEM,
            f"{found}, no node {config.dram_numa_node}",
            "set dram_numa_node to one of them or -1",
        )


def ssd(config: UmbpConfig) -> Iterator[Finding]:
    """Whether the SSD tier's folder can take what it should.  Creates nothing."""
    folder = config.ssd_dir
    if folder is None or not config.ssd_active:
        yield Finding("SSD tier", Status.NOTE, "off", "set ssd_dir to keep KV over a restart")
        return
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        yield Finding("SSD tier", Status.PROBLEM, f"{parent} is not a folder that can be written to", "choose another")
        return
    kind = _file_system(parent)
    free, held = shutil.disk_usage(parent).free, _held_bytes(folder)
    room = f"{readable(free)} free and {readable(held)} held"
    found = f"{folder} ({kind}): {room}, ssd_capacity is {readable(config.ssd_capacity)}"
    if free + held < config.ssd_capacity:
        yield Finding("SSD tier", Status.PROBLEM, found, f"set ssd_capacity to at most {readable((free + held) * 0.9)}")
    elif kind in _VOLATILE:
        yield Finding("SSD tier", Status.WARNING, found, "this is memory, not a disk: nothing survives a reboot")
    elif kind in _NETWORKED:
        yield Finding(
            "SSD tier", Status.WARNING, found, "locks and direct I/O over a network are slow; use a local disk"
        )
    else:
        yield Finding("SSD tier", Status.OK, found)


def _count(field: str, root: Path) -> int:
    return meminfo(field, root) // 1024  # a plain number, which meminfo took for kilobytes


def _held_bytes(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _file_system(path: Path) -> str:
    """The type of the file system that ``path`` lies on."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, name, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, name
    return kind
