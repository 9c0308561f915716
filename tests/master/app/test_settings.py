"""A master's configuration: priority of sources, the original's variables, and the sentences about what is wrong."""

from pathlib import Path

import pytest

from umbp_connectors import config as engine_config
from umbp_connectors.config_env import FOREIGN, OF_THE_MASTER
from umbp_connectors.master.settings import (
    ENV_KEYS,
    KEYS,
    ORIGINAL,
    Endpoint,
    MasterConfig,
    parse_endpoint,
    resolve,
)
from umbp_core.errors import ConfigError
from umbp_core.master.model import MasterSettings


def problems_of(**sources: object) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(**({"env": {}} | sources))  # type: ignore[arg-type]
    return str(caught.value)


def test_without_any_source_a_master_listens_on_loopback_only() -> None:
    resolved = resolve({}, {})
    assert set(resolved.origins.values()) == {"default"}
    config = resolved.config
    assert (config.listen, config.native_listen, config.metrics_listen) == (
        "127.0.0.1:50051",
        "127.0.0.1:50052",
        "127.0.0.1:9091",
    )
    assert config.settings() == MasterSettings()


def test_sources_rank_command_line_environment_file_defaults(tmp_path: Path) -> None:
    path = tmp_path / "master.toml"
    path.write_text("heartbeat_ttl_sec = 1\nreaper_interval_sec = 1\nhit_query_max_batch = 1\n", encoding="utf-8")
    env = {"UMBP_HEARTBEAT_TTL_SEC": "2", "UMBP_REAPER_INTERVAL_SEC": "2", "UMBP_MASTER_CONFIG": str(path)}
    resolved = resolve({"heartbeat_ttl_sec": 3, "listen": None}, env, {"listen": "0.0.0.0:7", "hit_query_max_batch": 9})
    config = resolved.config
    assert (config.heartbeat_ttl_sec, config.reaper_interval_sec, config.hit_query_max_batch) == (3, 2, 1)
    assert config.listen == "0.0.0.0:7"
    assert resolved.origins["heartbeat_ttl_sec"] == "command line"
    assert resolved.origins["reaper_interval_sec"] == "environment UMBP_REAPER_INTERVAL_SEC"
    assert resolved.origins["hit_query_max_batch"] == f"file {path}"
    assert resolved.origins["listen"] == "default"


VARIABLES = [
    ("UMBP_HEARTBEAT_TTL_SEC", "11", "heartbeat_ttl", 11.0),
    ("UMBP_MAX_MISSED_HEARTBEATS", "4", "max_missed_heartbeats", 4),
    ("UMBP_HEARTBEAT_INTERVAL_DIVISOR", "5", "heartbeat_interval_divisor", 5),
    ("UMBP_REAPER_INTERVAL_SEC", "6", "reaper_interval", 6.0),
    ("UMBP_EVICTION_CHECK_INTERVAL_SEC", "7", "eviction_interval", 7.0),
    ("UMBP_LEASE_DURATION_SEC", "8", "lease_duration", 8.0),
    ("UMBP_HIT_INDEX_TTL_SEC", "9", "hit_ttl", 9.0),
    ("UMBP_HIT_INDEX_GC_INTERVAL_SEC", "10", "hit_gc_interval", 10.0),
    ("UMBP_HIT_QUERY_MAX_BATCH", "12", "hit_query_max", 12),
    ("UMBP_ROUTE_PUT_SELECT_ALGO", " random ", "put_select", "random"),
    ("UMBP_ROUTE_PUT_NODE_AFFINITY", "local", "put_affinity", "local"),
]


@pytest.mark.parametrize(("name", "text", "setting", "value"), VARIABLES)
def test_variables_of_the_original_keep_their_meaning(name: str, text: str, setting: str, value: object) -> None:
    assert vars_of(resolve({}, {name: text}).config.settings())[setting] == value


def vars_of(settings: MasterSettings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_other_variables_of_the_original() -> None:
    env = {
        "UMBP_EVICTKEY_DEADLINE_MS": "250",
        "UMBP_GRPC_SHUTDOWN_DEADLINE_SEC": "1.5",
        "UMBP_METADATA_BACKEND": "redis",
        "UMBP_REDIS_URI": "tcp://10.0.0.1:6379",
        "UMBP_REDIS_NAMESPACE": "blue",
        "UMBP_REDIS_PASSWORD": "hush",
        "UMBP_REDIS_CONNECT_TIMEOUT_MS": "10",
        "UMBP_REDIS_SOCKET_TIMEOUT_MS": "20",
        "UMBP_REDIS_REQUIRED": "0",
        "UMBP_LOG_LEVEL": "1",
    }
    config = resolve({}, env).config
    assert (config.evictkey_deadline_ms, config.grpc_shutdown_deadline_sec) == (250, 1.5)
    assert (config.metadata_backend, config.redis_uri, config.redis_namespace) == (
        "redis",
        env["UMBP_REDIS_URI"],
        "blue",
    )
    assert (config.redis_password, config.redis_connect_timeout_ms, config.redis_socket_timeout_ms) == ("hush", 10, 20)
    assert (config.redis_required, config.log_level) == (False, "warning")
    assert "hush" not in repr(config)
    assert resolve({}, {"UMBP_METADATA_BACKEND": "inmemory"}).config.metadata_backend == "embedded"


ANY_TEXT = {
    *("config_file", "native_socket", "token", "token_file", "tls_cert", "tls_key", "tls_client_ca", "state_dir"),
    *("redis_uri", "redis_namespace", "redis_password"),
}


@pytest.mark.parametrize("name", sorted(name for name, key in ENV_KEYS.items() if key not in ANY_TEXT))
def test_every_value_that_cannot_be_used_is_named_with_its_variable(name: str) -> None:
    text = problems_of(env={name: "four bananas"})
    assert f"{ENV_KEYS[name]} = 'four bananas' from environment {name}: " in text


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e300", "ten", "3x"])
def test_times_are_bounded(value: str) -> None:
    assert "UMBP_HEARTBEAT_TTL_SEC" in problems_of(env={"UMBP_HEARTBEAT_TTL_SEC": value})


def test_empty_variable_counts_as_not_set() -> None:
    assert resolve({}, {"UMBP_HEARTBEAT_TTL_SEC": " "}).origins["heartbeat_ttl_sec"] == "default"


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ({"env": {"UMBP_HEARTBEAT_TTL_SECS": "1"}}, "did you mean 'UMBP_HEARTBEAT_TTL_SEC'?"),
        ({"env": {"UMBP_DRAM_CAPCITY": "1"}}, "did you mean 'UMBP_DRAM_CAPACITY'?"),
        ({"options": {"lissten": "x"}}, "unknown key 'lissten' in command line; did you mean 'listen'?"),
        ({"env": {"UMBP_ZZZ": "1"}}, "`umbp master --show-config` lists the known ones"),
        ({"options": {"config_file": "/no/such.toml"}}, "/no/such.toml cannot be read"),
        ({"options": {"listen": "none", "native_listen": "none"}}, "a master that nobody reaches"),
        ({"options": {"listen": "none", "native_listen": "auto"}}, "a master that nobody reaches"),
        ({"options": {"token": "a", "token_file": "/t"}}, "leave one out"),
        ({"options": {"eviction_low_watermark": 0.95}}, "is above eviction_high_watermark"),
        ({"options": {"listen": "50051"}}, "an address is HOST:PORT"),
        ({"options": {"metrics_listen": "h:70000"}}, "there is no port 70000"),
    ],
)
def test_what_is_wrong_is_a_sentence(sources: dict[str, object], sentence: str) -> None:
    assert sentence in problems_of(**sources)


def test_a_secret_is_not_told() -> None:
    text = problems_of(options={"token": ["s3cret"]})
    assert "token = (secret) from command line" in text
    assert "s3cret" not in text


def test_unknown_key_in_a_file_suggests_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "master.toml"
    path.write_text('native_sokcet = "/x"\n', encoding="utf-8")
    assert f"unknown key 'native_sokcet' in file {path}; did you mean 'native_socket'?" in problems_of(
        options={"config_file": str(path)}
    )


def test_variables_of_engines_and_of_the_platform_are_not_ours() -> None:
    env = dict.fromkeys(set(engine_config.ENV_KEYS) - set(ENV_KEYS), "1") | dict.fromkeys(FOREIGN - set(ENV_KEYS), "x")
    env |= {"UMBP_MASTER_SERVICE_HOST": "10.0.0.1", "UMBP_MASTER_PORT": "tcp://10.0.0.1:1", "UMBP_LOG_LEVEL": "info"}
    env |= {"UMBP_SERVICE_HOST": "10.0.0.1", "UMBP_PORT": "tcp://10.0.0.1:1", "UMBP_PORT_1_TCP_ADDR": "10.0.0.1"}
    assert resolve({}, env).config == MasterConfig()


NAMES = """
    HEARTBEAT_TTL_SEC MAX_MISSED_HEARTBEATS HEARTBEAT_INTERVAL_DIVISOR REAPER_INTERVAL_SEC EVICTION_CHECK_INTERVAL_SEC
    LEASE_DURATION_SEC EVICTKEY_DEADLINE_MS HIT_INDEX_TTL_SEC HIT_INDEX_GC_INTERVAL_SEC HIT_QUERY_MAX_BATCH
    ROUTE_PUT_SELECT_ALGO ROUTE_PUT_NODE_AFFINITY MASTER_INDEX_SHARDS MASTER_MIN_POLLERS MASTER_MAX_POLLERS
    METADATA_BACKEND REDIS_URI REDIS_NAMESPACE REDIS_PASSWORD REDIS_SHARD_URIS REDIS_CLUSTER REDIS_CONNECT_TIMEOUT_MS
    REDIS_SOCKET_TIMEOUT_MS REDIS_POOL_SIZE REDIS_BLOCK_SHARDS REDIS_REQUIRED DRAM_READ_LEASE_MS SSD_READ_LEASE_MS
    SSD_PREPARE_TIMEOUT_MS SSD_GET_MAX_ATTEMPTS SSD_GET_RETRY_BACKOFF_MS RELEASE_LEASE_MAX_RETRIES
    RELEASE_LEASE_TIMEOUT_MS SSD_STARTUP_DISCARD RPC_SHUTDOWN_TIMEOUT_MS GRPC_SHUTDOWN_DEADLINE_SEC
    METRICS_REPORT_INTERVAL_MS AUTO_FLUSH_EVENT_THRESHOLD DRAM_CAPACITY DRAM_HIGH_WM DRAM_LOW_WM DRAM_USE_HUGEPAGES
    DRAM_HUGEPAGE_SIZE DRAM_NUMA_NODE DRAM_PREFAULT SSD_ENABLED SSD_DIR SSD_CAPACITY SSD_BACKEND SSD_HIGH_WM SSD_LOW_WM
    EVICTION_POLICY ROLE DRAM_NT_COPY DRAM_READ_THREADS DRAM_WRITE_THREADS LOCAL_COPY_TIMING SPDK_BDEV SPDK_REACTOR_MASK
    SPDK_MEM_MB SPDK_NVME_PCI SPDK_NVME_CTRL SPDK_IO_WORKERS SPDK_RING_MB SPDK_RAID_STRIP_KB SPDK_PROXY_SHM
    SPDK_PROXY_TENANT_ID STANDALONE_ADDRESS STANDALONE_AUTO_START STANDALONE_STARTUP_TIMEOUT_MS STANDALONE_BIN
    DISTRIBUTED_STAGING_BUFFER_SIZE DISTRIBUTED_DRAM_PAGE_SIZE MASTER_ADDRESS MASTER_AUTO_START MASTER_BIN NODE_ADDRESS
    NODE_ID NODE_TAGS IO_ENGINE_HOST IO_ENGINE_PORT IO_ENGINE_PORTS PEER_SERVICE_PORT CACHE_REMOTE_FETCHES
    DISABLE_ZERO_COPY_REGISTER RANGES_PER_CALL LAYER_GROUP OFFLOAD_COALESCE_PAGES LOAD_SPLIT
"""
"""Variables of the original, without ``UMBP_``; not to be edited to make a test pass."""


def test_no_variable_of_the_original_ends_a_start() -> None:
    """Processes of one host share an environment."""
    names = {f"UMBP_{name}" for name in NAMES.split()}
    assert resolve({}, dict.fromkeys(names - set(ENV_KEYS), "1")).config == MasterConfig()
    assert {name for name, key in ENV_KEYS.items() if key in ORIGINAL} - {"UMBP_LOG_LEVEL"} <= names


def test_variables_of_a_master_may_stand_in_the_environment_of_an_engine() -> None:
    assert set(ENV_KEYS) - {"UMBP_LOG_LEVEL"} <= {*OF_THE_MASTER, *FOREIGN, *redis_names()}
    engine_config.resolve({}, dict.fromkeys(set(ENV_KEYS) - {"UMBP_LOG_LEVEL"}, "x"))


def redis_names() -> set[str]:
    return {name for name in ENV_KEYS if name.startswith("UMBP_REDIS_")}


def test_originals_names_are_keys() -> None:
    assert set(KEYS) >= ORIGINAL


@pytest.mark.parametrize(
    ("text", "endpoint", "loopback"),
    [
        ("127.0.0.1:1", ("127.0.0.1", 1), True),
        ("localhost:0", ("localhost", 0), True),
        ("[::1]:5", ("::1", 5), True),
        ("0.0.0.0:50051", ("0.0.0.0", 50051), False),
        ("[::]:9", ("::", 9), False),
        ("node-7.example:80", ("node-7.example", 80), False),
    ],
)
def test_endpoints(text: str, endpoint: tuple[str, int], loopback: bool) -> None:
    parsed = parse_endpoint(text)
    assert parsed == Endpoint(*endpoint)
    assert str(parsed) == text
    assert parsed.loopback is loopback


@pytest.mark.parametrize("text", ["", "h", ":1", "h:", "h:x", "::1:5", "h:-1", "h:65536", "h:１"])  # noqa: RUF001
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match=r"an address is|there is no port"):
        parse_endpoint(text)


@pytest.mark.parametrize(
    ("listen", "endpoint"),
    [("0.0.0.0:50051", ("0.0.0.0", 50052)), ("h:0", ("h", 0)), ("h:65535", None)],
)
def test_automatic_native_door_is_beside_the_other(listen: str, endpoint: tuple[str, int] | None) -> None:
    config = resolve({"listen": listen, "native_listen": "auto"}, {}).config
    assert config.native_endpoint == (None if endpoint is None else Endpoint(*endpoint))


def test_doors_can_be_closed() -> None:
    config = resolve({"listen": "none", "metrics_listen": "NONE", "native_socket": "/run/x.sock"}, {}).config
    assert config.grpc_endpoint is None
    assert config.metrics_endpoint is None
    assert config.native_endpoint == Endpoint("127.0.0.1", 50052)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, True),
        ({"state_dir": "none"}, False),
        ({"state_dir": "memory"}, False),
        ({"state_dir": "/x"}, True),
        ({"metadata_backend": "none"}, False),
        ({"metadata_backend": "redis", "state_dir": "none"}, True),
    ],
)
def test_whether_nodes_are_remembered(options: dict[str, str], kept: bool) -> None:
    assert resolve(options, {}).config.keeps_state is kept
