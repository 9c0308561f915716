"""What stores of other projects reached: figures that were measured once, to be quoted beside ours.

Best of several runs in GB/s, 2026, on a virtual machine of two cores with a virtio disk, as this project's own figures
are.  They are quoted, not measured again: another day or machine gives others.  None of them verifies what it reads,
except UMBP's SSD tier.
"""

from __future__ import annotations

import _report

SIZES = ("64 KiB", "256 KiB", "1 MiB", "4 MiB")

_DRAM = (
    ("LMCache 0.5.6, CPU tier in process, put", 1.8, 5.3, 6.2, 6.6),
    ("LMCache 0.5.6, CPU tier in process, get", 3.6, 8.6, 10.5, 8.5),
    ("Mooncake 0.3.13, own segment, batch_put_from", 2.84, 3.81, 4.68, 4.68),
    ("Mooncake 0.3.13, own segment, batch_get_into", 3.41, 3.58, 4.10, 4.85),
)
_SSD = (
    ("LMCache 0.5.6 fs_native, O_DIRECT, store", 0.69, 1.34, 1.67, 1.41),
    ("LMCache 0.5.6 fs_native, O_DIRECT, load", 0.74, 1.13, 1.22, 1.16),
    ("NIXL 1.5.1 POSIX, O_DIRECT, write", 2.08, 2.21, 2.32, 2.17),
    ("NIXL 1.5.1 POSIX, O_DIRECT, read", 1.41, 1.45, 1.72, 1.42),
    ("UMBP (the original), segment log, put", None, 0.094, None, None),
    ("UMBP (the original), segment log, get", None, 0.096, None, None),
    ("Mooncake 0.3.13, SSD offload, put / get", None, None, "0.048 / 0.31", None),
)


def rows() -> dict[str, list[_report.Row]]:
    """Sections for a report."""
    return {**in_dram(), "Quoted: peers on SSD, GB/s": _rows(_SSD)}


def in_dram() -> dict[str, list[_report.Row]]:
    """The section about memory."""
    return {"Quoted: peers in DRAM, GB/s": _rows(_DRAM)}


def _rows(quoted: tuple[tuple[object, ...], ...]) -> list[_report.Row]:
    return [
        {"what": what, **{size: "-" if figure is None else figure for size, figure in zip(SIZES, figures, strict=True)}}
        for what, *figures in quoted
    ]
