"""What the environment of an engine with Dynamo's KVBM means here.

Nothing of it is read: the names are another project's, its gigabytes are per tier of another design, and a pool that
took its size from a variable that nobody set for it would surprise its owner.  It is translated, for who moves over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from umbp_connectors.doctor.findings import Finding, Status

_OFF = frozenset({"0", "false", "no", "off"})
PREFIXES = ("DYN_KVBM_", "DYN_RUNTIME_ENABLED_KVBM")


class Meaning(NamedTuple):
    """A variable's default there, and what does the same here: a setting (``{}`` is the value), or why there is none.

    ``otherwise`` is the setting where the variable is switched off.
    """

    default: str
    setting: str = ""
    reason: str = ""
    otherwise: str = ""


MEANINGS: Mapping[str, Meaning] = MappingProxyType(
    {
        "DYN_KVBM_CPU_CACHE_GB": Meaning("unset", "UMBP_DRAM_CAPACITY={}GB"),
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": Meaning(
            "unset", reason="a tier is sized in bytes (UMBP_DRAM_CAPACITY); the log says how many blocks that is"
        ),
        "DYN_KVBM_DISK_CACHE_GB": Meaning("unset", "UMBP_SSD_CAPACITY={}GB"),
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": Meaning(
            "unset", reason="a tier is sized in bytes (UMBP_SSD_CAPACITY); the log says how many blocks that is"
        ),
        "DYN_KVBM_DISK_CACHE_DIR": Meaning("/tmp/", "UMBP_SSD_DIR={}"),
        "DYN_KVBM_DISK_ALLOCATOR_TYPE": Meaning("unset", reason="there is one kind of slab file"),
        "DYN_KVBM_DISK_DISABLE_O_DIRECT": Meaning(
            "false", "UMBP_SSD_DIRECT_IO=false", otherwise="UMBP_SSD_DIRECT_IO=true"
        ),
        "DYN_KVBM_DISK_ZEROFILL_FALLBACK": Meaning("false", reason="done by itself where a file system needs it"),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": Meaning(
            "false",
            "UMBP_SSD_OFFLOAD_POLICY=presence",
            "that is the default here, without the filter",
            otherwise="UMBP_SSD_OFFLOAD_POLICY=presence,frequency",
        ),
        "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": Meaning(
            "0", "UMBP_DRAM_OFFLOAD_POLICY=presence,priority UMBP_OFFLOAD_MIN_PRIORITY={}"
        ),
        "DYN_KVBM_MAX_CONCURRENT_TRANSFERS": Meaning(
            "4", "UMBP_MAX_CONCURRENT_LOADS={0} UMBP_MAX_CONCURRENT_STORES={0}"
        ),
        "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE": Meaning("16", "UMBP_MAX_TRANSFER_BLOCKS={}"),
        "DYN_KVBM_TRANSFER_BATCH_SIZE": Meaning("unset", "UMBP_MAX_TRANSFER_BLOCKS={}"),
        "DYN_KVBM_DISABLE_WRITE_COMBINED": Meaning("false", reason="pinned memory is never write-combined here"),
        "DYN_KVBM_ENABLE_NUMA": Meaning("false", reason="name the node: UMBP_DRAM_NUMA_NODE"),
        "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": Meaning(
            "120", reason="vLLM's own start waits for its workers; UMBP_LOOKUP_TIMEOUT_MS bounds a request's wait"
        ),
        "DYN_KVBM_LEADER_ZMQ_HOST": Meaning("127.0.0.1", reason="leader and workers speak through vLLM; no ports"),
        "DYN_KVBM_LEADER_ZMQ_PUB_PORT": Meaning("56001", reason="leader and workers speak through vLLM; no ports"),
        "DYN_KVBM_LEADER_ZMQ_ACK_PORT": Meaning("56002", reason="leader and workers speak through vLLM; no ports"),
        "DYN_KVBM_TRTLLM_ZMQ_PORT": Meaning("unset", reason="there is no TensorRT-LLM adapter"),
        "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR": Meaning(
            "true", "UMBP_REPORT={}", "a master knows the tiers of every node; vLLM's event stream names them too"
        ),
        "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE": Meaning(
            "dedup", reason="both at once: a master counts a hash once per tier, events go out unchanged"
        ),
        "DYN_KVBM_METRICS": Meaning("false", reason="always on, in the engine's own metrics"),
        "DYN_KVBM_METRICS_PORT": Meaning("6880", reason="the engine's own port"),
        "DYN_KVBM_CACHE_STATS_MAX_REQUESTS": Meaning(
            "1000", reason="vLLM's log has the rate of the last 1000 requests; over any time it is PromQL's"
        ),
        "DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS": Meaning("5", reason="vLLM's: VLLM_LOG_STATS_INTERVAL"),
        "DYN_KVBM_ENABLE_RECORD": Meaning("false", reason="`umbp debug dump` shows a live engine; nothing is recorded"),
        "DYN_KVBM_NCCL_MLA_MODE": Meaning("false", reason="ranks with the same KV read one rank's pages by themselves"),
        "DYN_KVBM_NCCL_MAX_CTAS": Meaning("unset", reason="nothing goes through NCCL"),
        "DYN_RUNTIME_ENABLED_KVBM": Meaning("false", reason="there is no runtime to join; UMBP_MASTER_ADDRESS tells"),
    }
)
"""Every variable of KVBM that its documents or its code name; ``DYN_KVBM_NIXL_BACKEND_*`` besides."""


def environment(env: Mapping[str, str]) -> Iterator[Finding]:
    """One note for each variable of KVBM that is set: what to set instead."""
    for name, value in env.items():
        if not name.startswith(PREFIXES) or not value.strip():
            continue
        meaning = MEANINGS.get(name, Meaning("", reason="it means nothing here"))
        off = meaning.otherwise and value.strip().lower() in _OFF
        setting = (meaning.otherwise if off else meaning.setting).format(value)
        advice = "; ".join(part for part in (setting and f"set {setting}", meaning.reason) if part)
        yield Finding(name, Status.NOTE, f"{value}; Dynamo reads it, umbp does not", advice)
