"""The configuration of a master: command line, environment, TOML file, defaults, in that order.

Variables of the original keep their names and meanings; what the original does not have is ``UMBP_MASTER_`` and the
key in capitals.  What cannot be used ends the start with a sentence that names the variable.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from umbp_connectors import config as engine_config
from umbp_connectors.config_env import OF_OTHERS, OURS_BUT_NO_KEY, is_foreign
from umbp_connectors.config_layers import Given, Layer, build, merge, origins, read_environment, read_file
from umbp_connectors.config_model import AbsolutePath, Count, LogLevel, Size
from umbp_core.master.model import MasterSettings

COMMAND_LINE = "command line"
GRPC_PORT = 50051
NATIVE_PORT = 50052
METRICS_PORT = 9091
MIB = 1 << 20
_NONE = ("none", "memory", "off")
_TEN_YEARS = 10 * 366 * 86_400
_BACKENDS = {"inmemory": "embedded"}
"""The original's word for "no Redis"; our embedded store needs no service either."""


class Endpoint(NamedTuple):
    """Where to listen; port 0 means any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def parse_endpoint(text: str) -> Endpoint:
    """The endpoint that ``HOST:PORT`` or ``[IPV6]:PORT`` names.  Raises ``ValueError``."""
    host, separator, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or (":" in host and not bracketed) or not port.isascii() or not port.isdigit():
        raise ValueError("an address is HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    if int(port) > 65_535:
        raise ValueError(f"there is no port {port}: the last one is 65535")
    return Endpoint(host[1:-1] if bracketed else host, int(port))


def _address(value: str) -> str:
    return "none" if value.lower() in _NONE else str(parse_endpoint(value))


def _native_address(value: str) -> str:
    return "auto" if value.lower() == "auto" else _address(value)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _backend(value: object) -> object:
    text = str(value).strip().lower()
    return _BACKENDS.get(text, text)


def _word(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


Address = Annotated[str, AfterValidator(_address)]
NativeAddress = Annotated[str, AfterValidator(_native_address)]
Interval = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=_TEN_YEARS, allow_inf_nan=False)]
Deadline = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=3_600_000)]
Ratio = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=1, allow_inf_nan=False)]

_ORIGINAL_KEYS = """
    heartbeat_ttl_sec max_missed_heartbeats heartbeat_interval_divisor reaper_interval_sec
    eviction_check_interval_sec lease_duration_sec evictkey_deadline_ms hit_index_ttl_sec
    hit_index_gc_interval_sec hit_query_max_batch route_put_select_algo route_put_node_affinity
    metadata_backend redis_uri redis_namespace redis_password redis_connect_timeout_ms
    redis_socket_timeout_ms redis_required grpc_shutdown_deadline_sec log_level
"""
ORIGINAL = frozenset(_ORIGINAL_KEYS.split())
"""Keys whose environment variable is the original's: ``UMBP_`` and the key."""


class MasterConfig(BaseModel):
    """A complete, checked configuration of a master.  Immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, coerce_numbers_to_str=True)

    config_file: AbsolutePath | None = Field(None, description="TOML file with any of these keys.")
    listen: Address = Field(
        f"127.0.0.1:{GRPC_PORT}", description="Where UMBP's gRPC is served; `none`: nowhere.", validate_default=True
    )
    native_listen: NativeAddress = Field(
        f"127.0.0.1:{NATIVE_PORT}",
        description="Where the native protocol is served over TCP; `none`: nowhere; `auto`: the host of `listen` and "
        "the port after its, or nowhere when that one is taken.",
    )
    native_socket: AbsolutePath | None = Field(
        None, description="Unix socket of the native protocol; only this user may connect."
    )
    metrics_listen: Address = Field(
        f"127.0.0.1:{METRICS_PORT}", description="Where `/metrics`, `/healthz` and `/readyz` are; `none`: nowhere."
    )

    token: str = Field("", repr=False, description="Shared token that clients have to send; better in a file.")
    token_file: AbsolutePath | None = Field(None, description="File that holds the shared token and nothing else.")
    tls_cert: AbsolutePath | None = Field(None, description="Certificate chain (PEM) of both protocols.")
    tls_key: AbsolutePath | None = Field(None, description="Private key (PEM) of `tls_cert`.")
    tls_client_ca: AbsolutePath | None = Field(
        None, description="Clients have to show a certificate that one of these (PEM) signed."
    )

    metadata_backend: Annotated[Literal["embedded", "redis", "none"], BeforeValidator(_backend)] = Field(
        "embedded",
        description="Where nodes are remembered over a restart: a file in `state_dir`, Redis or Valkey, or nowhere. "
        "`inmemory` is the original's word for `embedded`.",
    )
    state_dir: str = Field(
        "",
        description="Folder of the embedded store, one per master; `none`: nothing is kept. Empty: a folder for "
        "`listen` below `$XDG_STATE_HOME/umbp`.",
    )
    redis_uri: str = Field("tcp://127.0.0.1:6379", description="`tcp://`, `redis://`, `rediss://` or `unix://`.")
    redis_namespace: str = Field("default", description="Keeps masters that share a Redis apart.")
    redis_password: str = Field("", repr=False, description="Password of the Redis.")
    redis_connect_timeout_ms: Deadline = Field(1000, description="Deadline of connecting to the Redis.")
    redis_socket_timeout_ms: Deadline = Field(1000, description="Deadline of one command of the Redis.")
    redis_required: bool = Field(
        True, description="Whether a Redis that is away at the start ends it; later it never ends anything."
    )

    heartbeat_ttl_sec: Interval = Field(10.0, description="Time to live of a sign of life.")
    max_missed_heartbeats: Count = Field(3, description="A node expires after this many times the ttl.")
    heartbeat_interval_divisor: Count = Field(2, description="Nodes send a heartbeat every ttl divided by this.")
    reaper_interval_sec: Interval = Field(5.0, description="How often expired nodes are looked for.")
    expired_retention_sec: Interval = Field(
        86_400.0, description="For this long the address of an expired node is kept."
    )
    eviction_check_interval_sec: Interval = Field(5.0, description="How often full nodes are looked for.")
    eviction_high_watermark: Ratio = Field(0.9, description="A tier fuller than this is told to evict ...")
    eviction_low_watermark: Ratio = Field(0.7, description="... until it is only this full.")
    evictkey_deadline_ms: Deadline = Field(1000, description="Deadline of telling a node to evict.")
    lease_duration_sec: Interval = Field(2.0, description="What a reader was sent to is not evicted for this long.")
    hit_index_ttl_sec: Interval = Field(7200.0, description="A hit counter without hits is forgotten after this.")
    hit_index_gc_interval_sec: Interval = Field(60.0, description="How often such counters are looked for.")
    hit_query_max_batch: Count = Field(4096, description="Hashes that one question for hit counts may name.")
    query_max: Count = Field(1 << 20, description="Hashes or keys that any other request may name.")
    route_put_select_algo: Annotated[Literal["most_available", "random"], BeforeValidator(_word)] = Field(
        "most_available", description="Which node a new block goes to."
    )
    route_put_node_affinity: Annotated[Literal["none", "same", "local"], BeforeValidator(_word)] = Field(
        "none", description="`same`: a batch stays together; `local`: the asking node first."
    )

    max_frame: Annotated[Size, Field(ge=1 << 16, le=64 * MIB)] = Field(
        16 * MIB, description="Largest message of the native protocol (gRPC: 64 MiB)."
    )
    grpc_shutdown_deadline_sec: Interval = Field(3.0, description="What a stop waits for calls that are under way.")
    log_level: LogLevel = Field("info", description="Level of the log; `0`, `1`, `2` mean info, warning, error.")

    @model_validator(mode="after")
    def _fits_together(self) -> MasterConfig:
        if self.eviction_low_watermark > self.eviction_high_watermark:
            raise ValueError("eviction_low_watermark is above eviction_high_watermark: give the lower one first")
        if self.listen == "none" and self.native_listen in ("none", "auto") and self.native_socket is None:
            raise ValueError("listen is none and so is every native door: a master that nobody reaches is of no use")
        if self.token and self.token_file is not None:
            raise ValueError("token and token_file are both set: leave one out")
        return self

    @staticmethod
    def env_name(key: str) -> str:
        """The environment variable of ``key``."""
        return f"UMBP_{key.upper()}" if key in ORIGINAL else f"UMBP_MASTER_{key.upper()}"

    @property
    def grpc_endpoint(self) -> Endpoint | None:
        """Where gRPC is served."""
        return None if self.listen == "none" else parse_endpoint(self.listen)

    @property
    def native_endpoint(self) -> Endpoint | None:
        """Where the native protocol is served over TCP."""
        if self.native_listen != "auto":
            return None if self.native_listen == "none" else parse_endpoint(self.native_listen)
        grpc = self.grpc_endpoint
        if grpc is None or grpc.port == 65_535:
            return None
        return Endpoint(grpc.host, grpc.port + 1 if grpc.port else 0)

    @property
    def metrics_endpoint(self) -> Endpoint | None:
        """Where metrics are served."""
        return None if self.metrics_listen == "none" else parse_endpoint(self.metrics_listen)

    @property
    def keeps_state(self) -> bool:
        """Whether nodes are remembered over a restart."""
        return self.metadata_backend == "redis" or (
            self.metadata_backend == "embedded" and self.state_dir.lower() not in _NONE
        )

    def settings(self) -> MasterSettings:
        """The part that the state machine needs."""
        return MasterSettings(
            heartbeat_ttl=self.heartbeat_ttl_sec,
            max_missed_heartbeats=self.max_missed_heartbeats,
            heartbeat_interval_divisor=self.heartbeat_interval_divisor,
            reaper_interval=self.reaper_interval_sec,
            expired_retention=self.expired_retention_sec,
            lease_duration=self.lease_duration_sec,
            eviction_interval=self.eviction_check_interval_sec,
            eviction_high_watermark=self.eviction_high_watermark,
            eviction_low_watermark=self.eviction_low_watermark,
            hit_ttl=self.hit_index_ttl_sec,
            hit_gc_interval=self.hit_index_gc_interval_sec,
            hit_query_max=self.hit_query_max_batch,
            query_max=self.query_max,
            put_select=self.route_put_select_algo,
            put_affinity=self.route_put_node_affinity,
        )


KEYS = tuple(MasterConfig.model_fields)
ENV_KEYS = {MasterConfig.env_name(key): key for key in KEYS} | {"UMBP_MASTER_CONFIG": "config_file"}
"""Environment variable -> key; ``UMBP_MASTER_CONFIG`` is short for ``UMBP_MASTER_CONFIG_FILE``."""
_ADVICE = "`umbp master --show-config` lists the known ones"


@dataclass(frozen=True)
class ResolvedMasterConfig:
    """A configuration of a master and, for each key, where its value came from."""

    config: MasterConfig
    origins: Mapping[str, str]


def resolve(
    options: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ResolvedMasterConfig:
    """The configuration of a master.

    ``options`` come from the command line (``None`` means not given), ``env`` is the environment (the process's own by
    default), ``defaults`` replace those of the model.  Raises ``ConfigError`` with one line per problem.
    """
    layers = [_from_options(options or {}), _from_env(os.environ if env is None else env)]
    merged = merge(layers)
    if "config_file" in merged:
        file = Layer(_ADVICE)
        read_file(file, Path(str(merged["config_file"].value)).expanduser(), KEYS)
        layers.append(file)
        merged = merge(layers)
    problems = [problem for layer in layers for problem in layer.problems]
    usual = {key: Given(value, "default") for key, value in (defaults or {}).items()}
    config = build(MasterConfig, usual | merged, problems, "umbp master")
    return ResolvedMasterConfig(config, origins(KEYS, merged))


def _from_options(options: Mapping[str, Any]) -> Layer:
    layer = Layer(_ADVICE)
    for key, value in options.items():
        if key not in MasterConfig.model_fields:
            layer.unknown(key, COMMAND_LINE, KEYS)
        elif value is not None:
            layer.add(key, value, COMMAND_LINE)
    return layer


def _from_env(env: Mapping[str, str]) -> Layer:
    layer = Layer(_ADVICE)
    read_environment(layer, env, ENV_KEYS, _not_ours, OURS_BUT_NO_KEY, OF_OTHERS.union(engine_config.ENV_KEYS))
    return layer


def _not_ours(name: str) -> bool:
    """Whether ``name`` is for engines, for the original's other processes, or for the platform."""
    return name in engine_config.ENV_KEYS or is_foreign(name)
