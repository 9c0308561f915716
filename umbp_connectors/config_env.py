"""Environment variables that begin with ``UMBP_`` and are not keys of ours.

The name space is shared with the original UMBP and with container platforms.  What the original knows and
we have no use for must not stop an engine; a misspelt name of ours must.  Hence a closed list.
"""

from __future__ import annotations

import re

OURS_BUT_NO_KEY = frozenset(
    {
        "UMBP_VLLM_NO_CLI_HOOK",  # kill switch of the vLLM adapter: only the JSON form stays
        "UMBP_SGLANG_NO_HOOKS",  # kill switch of the SGLang adapter: only `dynamic` stays
        "UMBP_SGLANG_OVERRIDE",  # our backend goes before one of the same name that SGLang may have
    }
)
"""Read elsewhere in this project, before there is a configuration."""

_FOREIGN_NAMES = """
    HEARTBEAT_TTL_SEC MAX_MISSED_HEARTBEATS HEARTBEAT_INTERVAL_DIVISOR REAPER_INTERVAL_SEC
    EVICTION_CHECK_INTERVAL_SEC LEASE_DURATION_SEC EVICTKEY_DEADLINE_MS HIT_INDEX_TTL_SEC HIT_INDEX_GC_INTERVAL_SEC
    HIT_QUERY_MAX_BATCH ROUTE_PUT_SELECT_ALGO ROUTE_PUT_NODE_AFFINITY MASTER_INDEX_SHARDS MASTER_MIN_POLLERS
    MASTER_MAX_POLLERS METADATA_BACKEND DRAM_READ_LEASE_MS SSD_READ_LEASE_MS SSD_PREPARE_TIMEOUT_MS
    SSD_GET_MAX_ATTEMPTS SSD_GET_RETRY_BACKOFF_MS RELEASE_LEASE_MAX_RETRIES RELEASE_LEASE_TIMEOUT_MS
    SSD_STARTUP_DISCARD RPC_SHUTDOWN_TIMEOUT_MS GRPC_SHUTDOWN_DEADLINE_SEC METRICS_REPORT_INTERVAL_MS
    AUTO_FLUSH_EVENT_THRESHOLD DRAM_HUGEPAGE_SIZE SSD_BACKEND ROLE
    DRAM_NT_COPY DRAM_READ_THREADS DRAM_WRITE_THREADS LOCAL_COPY_TIMING MASTER_LISTEN
    MASTER_AUTO_START MASTER_BIN IO_ENGINE_HOST IO_ENGINE_PORT IO_ENGINE_PORTS
    PEER_SERVICE_PORT CACHE_REMOTE_FETCHES DISABLE_ZERO_COPY_REGISTER RANGES_PER_CALL LAYER_GROUP
    OFFLOAD_COALESCE_PAGES LOAD_SPLIT
"""
_FOREIGN_FAMILIES = ("UMBP_SPDK_", "UMBP_REDIS_", "UMBP_STANDALONE_", "UMBP_DISTRIBUTED_")

FOREIGN = frozenset(f"UMBP_{name}" for name in _FOREIGN_NAMES.split())
"""Names of the original whose features this release does not have."""

_MASTER_NAMES = """
    CONFIG CONFIG_FILE LISTEN NATIVE_LISTEN NATIVE_SOCKET METRICS_LISTEN STATE_DIR TOKEN TOKEN_FILE TLS_CERT TLS_KEY
    TLS_CLIENT_CA TLS_CA MAX_FRAME QUERY_MAX EVICTION_HIGH_WATERMARK EVICTION_LOW_WATERMARK EXPIRED_RETENTION_SEC
"""
OF_THE_MASTER = frozenset(f"UMBP_MASTER_{name}" for name in _MASTER_NAMES.split())
"""Read by ``umbp master`` and the commands that ask it; they may stand in the environment of an engine too."""

OF_OTHERS = FOREIGN | OF_THE_MASTER
"""What the original and a master know; some are keys of an engine, too."""

# A Kubernetes service called umbp, or umbp-anything, puts these into every pod of its namespace.
_SERVICE_LINK = re.compile(
    r"UMBP(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)


def is_foreign(name: str) -> bool:
    """Whether ``name`` belongs to the original, to a master or to the platform, and is none of an engine's business."""
    return name in OF_OTHERS or name.startswith(_FOREIGN_FAMILIES) or _SERVICE_LINK.fullmatch(name) is not None
