"""The copier for the device that holds the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from umbp_core.errors import ConfigError
from umbp_core.ports import DeviceCopier, LayerCopier
from umbp_vllm.copier_cpu import CpuCopier
from umbp_vllm.copier_cuda import CudaCopier
from umbp_vllm.copy_plan import PageArena
from umbp_vllm.geometry import KvGeometry


class Copier(DeviceCopier, LayerCopier, Protocol):
    """A device copier with a life: ``open`` once before the first copy, ``close`` before the arena goes."""

    def open(self) -> None:
        """Take streams, staging memory and threads.  Raises ``ConfigError`` when the device refuses."""
        ...

    def close(self) -> None:
        """Give everything back after the copies under way have ended.  Idempotent."""
        ...


COPIERS: Mapping[str, Callable[[KvGeometry, PageArena], Copier]] = {
    "cpu": CpuCopier,
    "cuda": CudaCopier,
}
"""torch device type -> copier.  ROCm devices call themselves ``cuda`` in torch."""


def make_copier(geometry: KvGeometry, arena: PageArena) -> Copier:
    """The copier between ``geometry``'s device and ``arena``, not yet opened.

    Raises ``ConfigError`` for a device type without a copier.
    """
    kind = geometry.device.type
    if kind not in COPIERS:
        raise ConfigError(
            f"umbp has no copier for KV caches on {kind!r} devices, only for {', '.join(sorted(COPIERS))}; "
            "start this engine without --kv-connector umbp"
        )
    return COPIERS[kind](geometry, arena)
