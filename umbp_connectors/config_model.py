"""The one configuration model: every key, its type, its default and what it means.

A key has the same name in the engine's extra-config and in the TOML file; in the environment it is
``UMBP_`` and the name in capitals.  Where the values come from is :mod:`umbp_connectors.config`'s matter.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from umbp_core.errors import ConfigError

GIB = 1 << 30

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?:(?P<prefix>[KMGTP])(?P<binary>I?))?(?P<byte>B?)", re.IGNORECASE)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
# The numbers are those of UMBP_LOG_LEVEL in deployments of the original.
_LOG_LEVELS = {"0": "info", "1": "warning", "2": "error", "warn": "warning"}
_MODES = ("local", "daemon", "distributed")


def parse_size(value: object) -> int:
    """Bytes meant by ``value``: a number, or text such as ``4GiB``, ``4G`` (both binary) or ``500MB`` (decimal).

    A fraction of a byte is cut off.  Raises ``ValueError`` for anything else.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return int(value)
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a size is a number of bytes or text like 4GiB, 500MB or 4G")
    prefix = (match["prefix"] or "").upper()
    decimal = bool(match["byte"]) and not match["binary"]
    number = match["number"]
    scale: int = (1000 if decimal else 1024) ** _POWER[prefix]
    return int(number) * scale if number.isdigit() else int(float(number) * scale)


def _split_names(value: object) -> object:
    if isinstance(value, str):
        return tuple(name for name in (part.strip() for part in value.split(",")) if name)
    return value


def _known_mode(value: str) -> str:
    if value not in _MODES:
        raise ValueError("the modes are 'local', 'daemon' and, where a plug-in makes its client, 'distributed'")
    return value


def _log_level(value: object) -> object:
    text = str(value).strip().lower()
    return _LOG_LEVELS.get(text, text)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _endpoint(value: str) -> str:
    from umbp_connectors.master.settings import parse_endpoint

    if value:
        parse_endpoint(value)
    return value


def _loopback(value: str) -> str:
    from umbp_connectors.daemon.doors import loopback_endpoint

    return str(loopback_endpoint(value)) if value else value


def _addresses(value: str) -> str:
    from umbp_connectors.client.addresses import parse_addresses

    if value:
        try:
            parse_addresses(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return value


def _tags(value: tuple[str, ...]) -> tuple[str, ...]:
    for tag in value:
        if not tag.partition("=")[0] or "=" not in tag:
            raise ValueError(f"{tag!r} is no tag; give NAME=VALUE")
    return value


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=86_400)]
Milliseconds = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=3_600_000)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Fraction = Annotated[float | None, BeforeValidator(_no_bool), Field(gt=0, le=1)]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_log_level)]


class UmbpConfig(BaseModel):
    """A complete, checked configuration.  Immutable; safe to share between threads."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, coerce_numbers_to_str=True)

    mode: Annotated[str, AfterValidator(_known_mode)] = Field(
        "local",
        description="Who owns the bytes. `local`: the engine's own processes; nothing else to start. `daemon`: the "
        "host's `umbp daemon`, which keeps them when an engine ends. `distributed`: what a plug-in makes of it for "
        "`create_client`; none is built in, and engines refuse it.",
    )
    config_file: AbsolutePath | None = Field(
        None, description="TOML file with any of these keys; lowest priority above the defaults."
    )
    namespace: str = Field(
        "", description="Keeps pools of unrelated deployments apart even when model and layout are equal."
    )

    dram_capacity: Size = Field(4 * GIB, description="DRAM tier, total over all ranks of one engine.")
    dram_use_hugepages: bool = Field(
        False, description="Back the DRAM tier by huge pages; falls back to normal pages with one warning."
    )
    dram_numa_node: Annotated[int, BeforeValidator(_no_bool), Field(ge=-1)] = Field(
        -1, description="NUMA node that the DRAM tier is bound to; -1 leaves it to the kernel."
    )
    dram_prefault: bool = Field(
        True, description="Touch the DRAM tier's memory in the background after start, so that stores are fast."
    )

    ssd_dir: AbsolutePath | None = Field(None, description="Folder of the SSD tier; it survives a restart.")
    ssd_enabled: bool | None = Field(
        None, description="`false` switches the SSD tier off though `ssd_dir` is set; unset means on when it is set."
    )
    ssd_capacity: Size = Field(
        32 * GIB, description="SSD tier, total over all ranks; bounds everything below `ssd_dir`, catalogue included."
    )
    ssd_engines: Count = Field(
        1,
        description="Engines that use `ssd_dir` together, each with an equal part of `ssd_capacity`; "
        "those of `--data-parallel-size` (vLLM) and `--dp-size` and `--attn-dp-size` (SGLang) are counted without it.",
    )
    ssd_direct_io: bool = Field(
        True, description="Use O_DIRECT where the file system has it, so that the page cache is left to others."
    )

    ssd_durability: Literal["strict", "batched", "relaxed"] = Field(
        "batched",
        description="When what is on SSD survives a power failure: `strict`: before it counts as being there; "
        "`batched`: about a second later; `relaxed`: when the system writes it. A killed process loses nothing.",
    )

    daemon_socket: AbsolutePath | None = Field(
        None,
        description="Unix socket of the host's daemon; unset: `umbp-UID/daemon.sock` in the folder of temporary files.",
    )
    daemon_listen: Annotated[str, AfterValidator(_loopback)] = Field(
        "",
        description="Loopback address, `HOST:PORT`, at which a daemon serves who knows its token, too; empty: nowhere.",
    )
    daemon_address: Annotated[str, AfterValidator(_loopback)] = Field(
        "",
        description="Loopback address, `HOST:PORT`, at which the host's daemon is reached instead of `daemon_socket`.",
    )
    daemon_token: str = Field(
        "", repr=False, description="Token of the daemon's port; better in a file, which counts if both are given."
    )
    daemon_token_file: AbsolutePath | None = Field(
        None, description="File that holds the token of the daemon's port, and that only its owner can read."
    )
    daemon_auto_start: bool = Field(
        False, description="`daemon`: start the daemon, with this engine's values, when none is there."
    )
    daemon_start_timeout_s: Seconds = Field(30.0, description="How long a daemon that is started may take to be ready.")
    daemon_idle_exit_s: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=31_536_000)] | None = Field(
        None,
        description="A daemon ends after so many seconds without clients; 0: never. Unset: 1800 for one that an engine "
        "started, never for others.",
    )
    daemon_metrics_listen: Annotated[str, AfterValidator(_endpoint)] = Field(
        "", description="Where a daemon serves Prometheus metrics, `HOST:PORT`; empty: nowhere."
    )
    daemon_quota: Size | None = Field(
        None, description="The most of a daemon's DRAM that the pools of one namespace get together; unset: all of it."
    )

    eviction_policy: str = Field(
        "prefix_aware_lru",
        description="Who goes first: `lru`, `prefix_aware_lru` (of the oldest, the deepest in its prefix chain), or "
        "`priority_lru` (vLLM: of the lowest priority that a request said, the oldest).",
    )
    dram_high_watermark: Fraction = Field(
        None,
        description="A DRAM tier that is fuller than this part of it is emptied in the background; unset or 1: it may "
        "be full. `UMBP_DRAM_HIGH_WM` says the same.",
    )
    dram_low_watermark: Fraction = Field(
        None, description="... until it is only this full; unset: as full as the high one says. `UMBP_DRAM_LOW_WM`."
    )
    ssd_high_watermark: Fraction = Field(
        None, description="The same for the SSD tier; what leaves it is lost unless DRAM has it. `UMBP_SSD_HIGH_WM`."
    )
    ssd_low_watermark: Fraction = Field(
        None, description="... until it is only this full; unset: as full as the high one says. `UMBP_SSD_LOW_WM`."
    )

    dram_offload_policy: Names = Field(
        ("presence",),
        description="vLLM: which blocks go to DRAM: `all`, or those on which each of these agrees: `presence` (no tier "
        "has it), `frequency` (it was seen before), `priority` (the request's is high enough), a plug-in's.",
    )
    ssd_offload_policy: Names = Field(
        ("presence",),
        description="Which blocks go from DRAM to SSD: `all`, or those on which each of these agrees: `presence`, "
        "`frequency`, `priority` (vLLM), a plug-in's.",
    )
    offload_min_sightings: Annotated[Count, Field(le=11)] = Field(
        2, description="`frequency` lets a block pass from this sighting on."
    )
    offload_window_s: Seconds = Field(
        600.0, description="`frequency` forgets one sighting of a block for each time that this long has passed."
    )
    offload_min_priority: Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=100)] = Field(
        0, description="`priority` lets a block pass when it and all before it have at least this one; 0: every block."
    )

    max_concurrent_loads: Count = Field(4, description="Transfers of loads that may run at once per rank.")
    max_concurrent_stores: Count = Field(
        4, description="Transfers of stores (HBM to DRAM) that may run at once per rank."
    )
    max_concurrent_demotions: Count = Field(
        2, description="vLLM: transfers of demotions (DRAM to SSD) that may run at once per rank."
    )
    max_transfer_blocks: Count = Field(
        16, description="Blocks that a device copies at once; smaller loads, stores or demotions make one transfer."
    )
    copy_threads: Annotated[Count, Field(le=64)] = Field(
        2, description="SGLang and the client: threads that share the copies of one call, the caller among them."
    )
    io_threads: Annotated[Count, Field(le=256)] = Field(
        4, description="SSD I/O threads per rank; SGLang and the client: these for reads and as many for writes."
    )
    load_mode: Literal["async", "layerwise"] = Field(
        "async",
        description="vLLM: `async` loads a hit before its request is scheduled, `layerwise` while its first step runs, "
        "which waits for each layer; what comes from SSD is loaded `async` always.",
    )
    store_granularity: Literal["block", "layer"] = Field(
        "block",
        description="vLLM: `block` stores a block when the step that fills it has ended, `layer` each layer of it as "
        "soon as that layer is computed; it is published when all of it is there, either way.",
    )
    load_timeout_s: Seconds = Field(
        30.0,
        description="vLLM: a load that does not copy into the KV cache by then is recomputed; one that does is waited "
        "for, but with `layerwise`, where what the step still lacks is recomputed.",
    )
    store_timeout_s: Seconds = Field(
        60.0,
        description="vLLM: a store or demotion that has not begun to copy by then is given up; one that has runs to "
        "its end.",
    )
    lookup_timeout_ms: Milliseconds = Field(
        50, description="How long a request may wait for the answer what the pool holds before it counts as a miss."
    )
    share_load_timeout_ms: Milliseconds = Field(
        1000, description="How long a request waits for another one's load of the same prefix before it recomputes."
    )
    call_timeout_ms: Annotated[Milliseconds, Field(ge=1)] = Field(
        3000,
        description="SGLang: how long one call of a storage thread may take, and of any client one call to the daemon; "
        "what is not done by then is a miss.",
    )
    max_pending_stores: Count = Field(
        4096, description="Blocks waiting to be stored; beyond it new ones are not stored (counted, never an error)."
    )
    max_pending_demotions: Count = Field(
        4096, description="Blocks waiting to go to SSD; beyond it new ones stay in DRAM only."
    )
    store_decode_blocks: bool = Field(True, description="Store blocks that fill up while decoding, not only prompts.")
    min_load_blocks: Count = Field(1, description="Hits shorter than this many blocks are recomputed, not loaded.")
    load_failure_policy: Literal["recompute", "fail"] = Field(
        "recompute", description="What a load that fails means for its request: recompute the blocks, or an error."
    )

    master_address: Annotated[str, AfterValidator(_addresses)] = Field(
        "",
        description="The master that is told what this engine holds: `umbp://HOST:PORT`, `umbp+unix://PATH`, "
        "`grpc://HOST:PORT` or `HOST:PORT`; several, separated by commas, are alternatives. Empty: nobody is told.",
    )
    report: bool = Field(True, description="`false`: nobody is told though `master_address` is set.")
    report_interval_ms: Milliseconds = Field(
        20, description="Changes are told this often at most; the first one after a pause at once."
    )
    node_id: str = Field(
        "",
        description="Name of this engine at the master; empty: host, port, ranks and role. It has to be another one "
        "for every engine, and the same after a restart.",
    )
    node_address: str = Field("", description="Address of this engine at the master; empty: its host.")
    node_tags: Annotated[Names, AfterValidator(_tags)] = Field(
        (), description="More tags of this engine, `NAME=VALUE`, comma-separated; the master makes labels of them."
    )
    master_token: str = Field(
        "", repr=False, description="Token that the master asks for; better in a file, which counts if both are given."
    )
    master_token_file: AbsolutePath | None = Field(None, description="File that holds the master's token.")
    master_tls_ca: AbsolutePath | None = Field(
        None, description="Speak TLS with the master, and trust what this CA (PEM) signed."
    )
    master_client_cert: AbsolutePath | None = Field(
        None, description="Certificate (PEM) to show to a master that asks for one."
    )
    master_client_key: AbsolutePath | None = Field(None, description="Private key (PEM) of `master_client_cert`.")

    plugins: Names = Field((), description="Names of the plug-ins that may load, comma-separated; empty means all.")
    log_level: LogLevel = Field(
        "info", description="Level of the `umbp_*` loggers; `0`, `1`, `2` mean info, warning, error."
    )
    debug_socket: bool = Field(
        True, description="vLLM: let `umbp debug dump` of the same user ask this engine what it is doing."
    )

    @model_validator(mode="after")
    def _ssd_needs_a_folder(self) -> UmbpConfig:
        if self.ssd_enabled and self.ssd_dir is None:
            raise ValueError("ssd_enabled is true but ssd_dir is not set: name a folder, or leave ssd_enabled out")
        return self

    @model_validator(mode="after")
    def _low_is_not_above_high(self) -> UmbpConfig:
        for tier in ("dram", "ssd"):
            high, low = (self.__dict__[f"{tier}_{end}_watermark"] for end in ("high", "low"))
            if low is not None and (high is None or low > high):
                raise ValueError(
                    f"{tier}_low_watermark {low} is above {tier}_high_watermark or that is not set: "
                    "give both, the low one not above the high one"
                )
        return self

    @model_validator(mode="after")
    def _certificate_and_key(self) -> UmbpConfig:
        if (self.master_client_cert is None) != (self.master_client_key is None):
            raise ValueError("master_client_cert and master_client_key come together: give both, or neither")
        return self

    @property
    def ssd_active(self) -> bool:
        """Whether there is an SSD tier."""
        return self.ssd_dir is not None and self.ssd_enabled is not False

    @staticmethod
    def env_name(key: str) -> str:
        """The environment variable of ``key``."""
        return f"UMBP_{key.upper()}"
