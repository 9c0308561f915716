"""What the machine offers: memory, its limits, huge pages, NUMA nodes."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_MPOL_PREFERRED = 1
MADV_WIPEONFORK = 18
"""A child of ``fork`` finds zeros in such memory, and nothing is copied on its behalf (since Linux 4.14)."""
_MADV_POPULATE_WRITE = 23
_MBIND_NUMBERS = {"x86_64": 237, "aarch64": 235, "ppc64le": 259, "s390x": 268, "riscv64": 235}
_UNLIMITED = 1 << 60
"""cgroup v1 writes a huge number for "no limit"."""


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """How much memory this process can ever have, in bytes; ``cgroup`` is ``None`` without a limit."""

    physical: int
    cgroup: int | None

    @property
    def usable(self) -> int:
        """The smaller of the two."""
        return self.physical if self.cgroup is None else min(self.physical, self.cgroup)

    def describe(self) -> str:
        """For a message: what there is, in GiB."""
        text = f"{self.physical / 2**30:.1f} GiB of physical memory"
        if self.cgroup is not None and self.cgroup < self.physical:
            text += f", of which the container (cgroup) may use {self.cgroup / 2**30:.1f} GiB"
        return text


def memory_limits(root: Path = Path("/")) -> MemoryLimits:
    """Physical memory, and the tightest cgroup limit (v1 or v2) above this process."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [limit for _, _, limit in _cgroup_limits(root)]
    return MemoryLimits(physical, min(limits) if limits else None)


def memory_to_spare(root: Path = Path("/")) -> int:
    """Bytes that can be taken now: what the machine has available, and every cgroup above this process has left.

    A cgroup's page cache counts as left, as the kernel takes it back before it refuses anything.
    """
    spare = meminfo("MemAvailable", root)
    for folder, kind, limit in _cgroup_limits(root):
        used = sum(int(word) for word in _read(folder / kind.current).split() if word.isdigit())
        fields = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
        spare = min(spare, limit - used + int(fields.get(kind.cached, 0)))
    return spare


class _Kind(NamedTuple):
    """How a version of cgroups calls things."""

    limit: str
    current: str
    cached: str


_V2 = _Kind("memory.max", "memory.current", "inactive_file")
_V1 = _Kind("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroup_limits(root: Path) -> list[tuple[Path, _Kind, int]]:
    """Every memory limit on the way from this process's cgroup to the top."""
    mount = root / "sys/fs/cgroup"
    found: list[tuple[Path, _Kind, int]] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, kind = mount, _V2
        elif "memory" in controllers.split(","):
            base, kind = mount / "memory", _V1
        else:
            continue
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            limits = [int(word) for word in _read(level / kind.limit).split() if word.isdigit()]
            found += [(level, kind, limit) for limit in limits if limit < _UNLIMITED]
            if level == base:
                break
    return found


def meminfo(field: str, root: Path = Path("/")) -> int:
    """A field of ``/proc/meminfo`` in bytes; 0 when it is not there."""
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def populate(address: int, nbytes: int) -> None:
    """Make the pages behind ``address`` (page-aligned) present and writable without changing them.

    Other threads may write to the same memory meanwhile.  The GIL is released, which is why this does not go through
    :meth:`mmap.mmap.madvise`.  Raises ``OSError``: ``EINVAL`` on kernels before 5.14.
    """
    _check(_libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE))


def prefer_node(address: int, nbytes: int, node: int) -> None:
    """Let the kernel take the pages behind ``address`` from NUMA ``node`` while that one has memory.

    Preferred, not bound: a full node must not get the engine killed.  Raises ``OSError``.
    """
    number = _MBIND_NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(f"mbind's number is not known on {platform.machine()}")
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << (node % 64)
    _check(
        _libc().syscall(
            ctypes.c_long(number),
            ctypes.c_void_p(address),
            ctypes.c_ulong(nbytes),
            ctypes.c_int(_MPOL_PREFERRED),
            mask,
            ctypes.c_ulong(words * 64 + 1),
            ctypes.c_uint(0),
        )
    )


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
