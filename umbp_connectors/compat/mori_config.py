"""UMBP's configuration structs: their fields, their defaults, and what of them this pool uses.

Every field may be set, as in the original; what has no meaning here (SPDK, io_uring, staging buffers) does nothing.
"""

from __future__ import annotations

import enum
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from umbp_connectors.config_model import parse_size
from umbp_core.errors import ConfigError

GIB, MIB = 1 << 30, 1 << 20


class _Unchosen(float):
    """A default of the original's that means nothing here until somebody chooses a value."""


_HIGH, _LOW = _Unchosen(0.9), _Unchosen(0.7)


def chosen_watermarks(high: float, low: float) -> tuple[float, float] | None:
    """Both, if one of them was chosen; with the original's defaults a tier may be full, as in its local mode."""
    return None if isinstance(high, _Unchosen) and isinstance(low, _Unchosen) else (float(high), float(low))


class UMBPRole(enum.IntEnum):
    """Who writes a shared SSD folder."""

    Standalone = 0
    SharedSSDLeader = 1
    SharedSSDFollower = 2


class UMBPIoBackend(enum.IntEnum):
    """How the original reads and writes files."""

    Posix = 0
    IoUring = 1


class UMBPDurabilityMode(enum.IntEnum):
    """Whether what is on SSD survives a power failure when it counts as being there."""

    Strict = 0
    Relaxed = 1


class UMBPDeploymentMode(enum.IntEnum):
    """Who owns the bytes; ``StandaloneProcess`` is our daemon."""

    Local = 0
    StandaloneProcess = 1
    Distributed = 2


class UMBPTierType(enum.IntEnum):
    """The tiers, with the wire's numbers."""

    UNKNOWN = 0
    HBM = 1
    DRAM = 2
    SSD = 3


@dataclass
class UMBPDramConfig:
    """The DRAM tier."""

    capacity_bytes: int = 4 * GIB
    use_shared_memory: bool = False
    shm_name: str = "/umbp_dram"
    high_watermark: float = _HIGH
    low_watermark: float = _LOW
    use_hugepages: bool = False
    hugepage_size: int = 2 * MIB
    numa_node: int = -1
    prefault: bool = True


@dataclass
class UMBPIoConfig:
    """File access; our own decides by itself."""

    backend: UMBPIoBackend = UMBPIoBackend.IoUring
    queue_depth: int = 4096


@dataclass
class UMBPDurabilityConfig:
    """When what is on SSD is durable."""

    mode: UMBPDurabilityMode = UMBPDurabilityMode.Strict
    enable_background_gc: bool = True


@dataclass
class UMBPSsdConfig:
    """The SSD tier."""

    enabled: bool = True
    storage_dir: str = "/tmp/umbp_ssd"
    capacity_bytes: int = 32 * GIB
    layout_mode: int = 1
    segment_size_bytes: int = 256 * MIB
    high_watermark: float = _HIGH
    low_watermark: float = _LOW
    io: UMBPIoConfig = field(default_factory=UMBPIoConfig)
    durability: UMBPDurabilityConfig = field(default_factory=UMBPDurabilityConfig)
    ssd_backend: str = "file"
    spdk_bdev_name: str = ""
    spdk_reactor_mask: str = "0x1"
    spdk_mem_size_mb: int = 256
    spdk_nvme_pci_addr: str = ""
    spdk_nvme_ctrl_name: str = "NVMe0"
    spdk_io_workers: int = 4
    spdk_proxy_shm_name: str = "/umbp_spdk_proxy"
    spdk_proxy_tenant_id: int = 0
    spdk_proxy_tenant_quota_bytes: int = 0
    spdk_proxy_max_channels: int = 8
    spdk_proxy_data_per_channel_mb: int = 32
    spdk_proxy_bin: str = ""
    spdk_proxy_startup_timeout_ms: int = 30_000
    spdk_proxy_auto_start: bool = True
    spdk_proxy_idle_exit_timeout_ms: int = 30_000
    spdk_proxy_allow_borrow: bool = False
    spdk_proxy_reserved_shared_bytes: int = 0


@dataclass
class UMBPEvictionConfig:
    """Who leaves first."""

    policy: str = "lru"
    candidate_window: int = 16
    auto_promote_on_read: bool = True


@dataclass
class UMBPCopyPipelineConfig:
    """The copies from DRAM to SSD."""

    async_enabled: bool = True
    queue_depth: int = 4096
    worker_threads: int = 2
    batch_max_ops: int = 128


@dataclass
class UMBPMasterClientConfig:
    """The line to a master."""

    master_address: str = ""
    node_id: str = ""
    node_address: str = ""
    auto_heartbeat: bool = True
    tags: list[str] = field(default_factory=list)


@dataclass
class UMBPIoEngineConfig:
    """The original's RDMA engine."""

    host: str = ""
    port: int = 0


@dataclass
class UMBPDistributedConfig:
    """A pool over several hosts."""

    master_config: UMBPMasterClientConfig = field(default_factory=UMBPMasterClientConfig)
    io_engine: UMBPIoEngineConfig = field(default_factory=UMBPIoEngineConfig)
    staging_buffer_size: int = 64 * MIB
    ssd_staging_buffer_size: int = 256 * MIB
    ssd_staging_buffer_slots: int = 16
    peer_service_port: int = 0
    cache_remote_fetches: bool = True
    cache_remote_admission: int = 0
    admission_max_block_bytes: int = 16 * MIB
    dram_page_size: int = 0


@dataclass
class UMBPStandaloneProcessConfig:
    """A process that owns the host's bytes: ``umbp daemon``."""

    address: str = ""
    auto_start: bool = False
    startup_timeout_ms: int = 30_000
    worker_node_id: str = ""
    worker_node_address: str = ""
    tags: list[str] = field(default_factory=list)


@dataclass
class UMBPConfig:
    """All of it.  Two fields are ours.  ``object_bytes``: the largest object, or 0, and then that of the first put.

    ``namespace`` says whose the objects are, which their keys do not: model, weights, type, layout of the pages.
    Without one a client begins empty, and shares with nobody.
    """

    dram: UMBPDramConfig = field(default_factory=UMBPDramConfig)
    ssd: UMBPSsdConfig = field(default_factory=UMBPSsdConfig)
    eviction: UMBPEvictionConfig = field(default_factory=UMBPEvictionConfig)
    copy_pipeline: UMBPCopyPipelineConfig = field(default_factory=UMBPCopyPipelineConfig)
    role: UMBPRole = UMBPRole.Standalone
    distributed: UMBPDistributedConfig | None = None
    standalone_process: UMBPStandaloneProcessConfig | None = None
    force_ssd_copy_on_write: bool = False
    follower_mode: bool = False
    object_bytes: int = 0
    namespace: str = ""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> UMBPConfig:
        """What ``UMBP_*`` says, ours and the original's names; the rest are the defaults.  Raises ``ConfigError``."""
        found = os.environ if env is None else env
        config = cls()
        for names, (path, read) in _VARIABLES.items():
            *parts, last = path.split(".")
            part = operator.attrgetter(".".join(parts))(config) if parts else config
            for name in names.split():
                value = found.get(name, "").strip()
                if value:
                    setattr(part, last, _read(name, value, read))
        return config

    def validate(self) -> None:
        """Raises ``ConfigError`` where the original's ``Validate`` does."""
        if self.distributed is not None and self.standalone_process is not None:
            raise ConfigError("distributed and standalone_process exclude each other; set one of them")
        if self.standalone_process is not None and not self.namespace:
            raise ConfigError(
                "standalone_process shares objects among processes, and their keys do not say whose they are; "
                "name model, weights, type and layout by namespace (UMBP_NAMESPACE)"
            )
        if self.dram.capacity_bytes <= 0:
            raise ConfigError("dram.capacity_bytes has to be more than 0")
        if self.ssd.enabled and self.ssd.capacity_bytes <= 0:
            raise ConfigError("ssd.capacity_bytes has to be more than 0; or set ssd.enabled to False")


def _read(name: str, value: str, read: Callable[[str], object]) -> object:
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"{name} = {value!r}: {error}") from None


def _bytes(value: str) -> int:
    return parse_size(int(value) if value.isdigit() else value)


def _flag(value: str) -> bool:
    try:
        return _FLAGS[value.lower()]
    except KeyError:
        raise ValueError("neither true nor false") from None


def _durability(value: str) -> UMBPDurabilityMode:
    strict = value.lower() in ("strict", "sync")
    return UMBPDurabilityMode.Strict if strict else UMBPDurabilityMode.Relaxed


_FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "UMBP_DRAM_CAPACITY_BYTES UMBP_DRAM_CAPACITY": ("dram.capacity_bytes", _bytes),
    "UMBP_SSD_CAPACITY_BYTES UMBP_SSD_CAPACITY": ("ssd.capacity_bytes", _bytes),
    "UMBP_DRAM_HIGH_WM UMBP_DRAM_HIGH_WATERMARK": ("dram.high_watermark", float),
    "UMBP_DRAM_LOW_WM UMBP_DRAM_LOW_WATERMARK": ("dram.low_watermark", float),
    "UMBP_SSD_HIGH_WM UMBP_SSD_HIGH_WATERMARK": ("ssd.high_watermark", float),
    "UMBP_SSD_LOW_WM UMBP_SSD_LOW_WATERMARK": ("ssd.low_watermark", float),
    "UMBP_SSD_STORAGE_DIR UMBP_SSD_DIR": ("ssd.storage_dir", str),
    "UMBP_SSD_ENABLED": ("ssd.enabled", _flag),
    "UMBP_EVICTION_POLICY": ("eviction.policy", str),
    "UMBP_NAMESPACE": ("namespace", str),
    "UMBP_DRAM_USE_HUGEPAGES": ("dram.use_hugepages", _flag),
    "UMBP_DRAM_NUMA_NODE": ("dram.numa_node", int),
    "UMBP_DRAM_PREFAULT": ("dram.prefault", _flag),
    "UMBP_SSD_DURABILITY_MODE UMBP_SSD_DURABILITY": ("ssd.durability.mode", _durability),
}
"""Names of one thing, the later ones (ours) counting more; the field, and how its value is read."""
