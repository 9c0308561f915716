"""Our keys for what UMBP's configuration structs say."""

from __future__ import annotations

from typing import Any

from umbp_connectors.compat.mori_config import (
    UMBPConfig,
    UMBPDurabilityMode,
    UMBPStandaloneProcessConfig,
    chosen_watermarks,
)
from umbp_core.errors import ConfigError


def extra_of(config: UMBPConfig) -> dict[str, Any]:
    """Our keys for the original's fields."""
    extra: dict[str, Any] = {
        "dram_capacity": config.dram.capacity_bytes,
        "dram_use_hugepages": config.dram.use_hugepages,
        "dram_numa_node": config.dram.numa_node,
        "dram_prefault": config.dram.prefault,
        "eviction_policy": config.eviction.policy,
        "ssd_capacity": config.ssd.capacity_bytes,
        "io_threads": max(4, config.copy_pipeline.worker_threads),
    }
    for tier, part in (("dram", config.dram), ("ssd", config.ssd)):
        chosen = chosen_watermarks(part.high_watermark, part.low_watermark)
        if chosen is not None:
            extra |= dict(zip((f"{tier}_high_watermark", f"{tier}_low_watermark"), chosen, strict=True))
    if config.ssd.enabled:
        strict = config.ssd.durability.mode is UMBPDurabilityMode.Strict
        extra |= {"ssd_dir": config.ssd.storage_dir, "ssd_durability": "strict" if strict else "batched"}
    if config.standalone_process is not None:
        extra |= _daemon(config.standalone_process)
    if config.distributed is not None:
        master = config.distributed.master_config
        extra |= {
            "master_address": master.master_address,
            "node_id": master.node_id,
            "node_address": master.node_address,
            "node_tags": list(master.tags),
        }
    return extra


def _daemon(process: UMBPStandaloneProcessConfig) -> dict[str, Any]:
    return {
        "mode": "daemon",
        "daemon_socket": _socket(process.address),
        "daemon_auto_start": process.auto_start,
        "daemon_start_timeout_s": process.startup_timeout_ms / 1000,
        "node_id": process.worker_node_id,
        "node_address": process.worker_node_address,
        "node_tags": list(process.tags),
    }


def _socket(address: str) -> str | None:
    """The path of a gRPC address; ``None``, and so the usual place, for an empty one.  Raises ``ConfigError``."""
    text = address.strip()
    path = text.removeprefix("unix:")
    if path != text and path.startswith("//"):
        path = path.removeprefix("//")
    if text and not path.startswith("/"):
        raise ConfigError(
            f"standalone_process.address {address!r} is no Unix socket with its whole path; "
            "give unix:///PATH or /PATH, or nothing for the usual place of `umbp daemon`"
        )
    return path or None
