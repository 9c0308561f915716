"""The configuration: priority of sources, origins, and the sentences about what is wrong."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from umbp_connectors.config import EXTRA, KEYS, UmbpConfig, parse_size, resolve
from umbp_connectors.config_env import FOREIGN
from umbp_core.errors import ConfigError

GIB = 1 << 30


def problems_of(**sources: object) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(**({"env": {}} | sources))  # type: ignore[arg-type]
    return str(caught.value)


def toml(folder: Path, text: str) -> Path:
    path = folder / "umbp.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_any_source_every_value_is_a_default() -> None:
    resolved = resolve({}, {})
    assert resolved.config == UmbpConfig()
    assert set(resolved.origins) == set(KEYS)
    assert set(resolved.origins.values()) == {"default"}


@pytest.mark.statement("connector", 93)
def test_sources_rank_extra_config_environment_file_default(tmp_path: Path) -> None:
    path = toml(tmp_path, "io_threads = 1\nmin_load_blocks = 1\nmax_concurrent_loads = 1\n")
    env = {"UMBP_IO_THREADS": "2", "UMBP_MIN_LOAD_BLOCKS": "2"}
    resolved = resolve({"io_threads": 3}, env, path)
    assert (resolved.config.io_threads, resolved.origins["io_threads"]) == (3, EXTRA)
    assert resolved.config.min_load_blocks == 2
    assert resolved.origins["min_load_blocks"] == "environment UMBP_MIN_LOAD_BLOCKS"
    assert (resolved.config.max_concurrent_loads, resolved.origins["max_concurrent_loads"]) == (1, f"file {path}")
    assert (resolved.config.max_concurrent_stores, resolved.origins["max_concurrent_stores"]) == (4, "default")


@pytest.mark.parametrize("name", ["UMBP_CONFIG", "UMBP_CONFIG_FILE"])
def test_environment_names_the_file(tmp_path: Path, name: str) -> None:
    path = toml(tmp_path, 'dram_capacity = "1GiB"\n')
    resolved = resolve({}, {name: str(path)})
    assert resolved.config.dram_capacity == GIB
    assert resolved.config.config_file == path
    assert resolved.origins["config_file"] == f"environment {name}"


def test_extra_config_names_the_file_before_the_environment_does(tmp_path: Path) -> None:
    path = toml(tmp_path, 'namespace = "mine"\n')
    resolved = resolve({"config_file": str(path)}, {"UMBP_CONFIG": str(tmp_path / "missing.toml")})
    assert resolved.config.namespace == "mine"


def test_process_environment_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBP_IO_THREADS", "7")
    assert resolve().config.io_threads == 7


def test_empty_variable_counts_as_not_set() -> None:
    resolved = resolve({}, {"UMBP_DRAM_CAPACITY": "", "UMBP_SSD_DIR": "  "})
    assert resolved.config == UmbpConfig()


def test_null_in_extra_config_counts_as_not_set() -> None:
    assert resolve({"ssd_dir": None}, {}).origins["ssd_dir"] == "default"


@pytest.mark.parametrize("name", ["cpu_bytes_to_use", "dram_bytes", "dram_capacity"])
@pytest.mark.parametrize("value", [2 * GIB, float(2 * GIB), "2GiB", "2G", str(2 * GIB)])
def test_engine_may_deliver_the_dram_size_under_its_own_names(name: str, value: object) -> None:
    resolved = resolve({name: value}, {})
    assert resolved.config.dram_capacity == 2 * GIB
    assert resolved.origins["dram_capacity"].startswith(EXTRA)


def test_two_names_of_one_key_must_agree() -> None:
    assert resolve({"dram_bytes": "1G", "cpu_bytes_to_use": "1G"}, {}).config.dram_capacity == GIB
    text = problems_of(extra={"dram_bytes": 1, "cpu_bytes_to_use": 2})
    assert "dram_capacity is given twice" in text
    assert "dram_bytes" in text
    assert "cpu_bytes_to_use" in text


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"extra": {"dram_capcity": 1}}, ["'dram_capcity'", "engine extra-config", "'dram_capacity'"]),
        ({"env": {"UMBP_DRAM_CAPACTY": "1"}}, ["'UMBP_DRAM_CAPACTY'", "environment", "'UMBP_DRAM_CAPACITY'"]),
        ({"env": {"UMBP_MASTER_LISTN": "1"}}, ["'UMBP_MASTER_LISTN'", "environment", "'UMBP_MASTER_LISTEN'"]),
        ({"extra": {"zzzzzz": 1}}, ["'zzzzzz'", "`umbp config`"]),
    ],
)
@pytest.mark.statement("connector", 93)
def test_unknown_key_names_itself_its_source_and_the_nearest(sources: dict[str, object], expected: list[str]) -> None:
    text = problems_of(**sources)
    assert all(part in text for part in expected)


def test_unknown_key_in_a_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'ssd_dirr = "/x"\n')
    text = problems_of(file=path)
    assert f"unknown key 'ssd_dirr' in file {path}; did you mean 'ssd_dir'?" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dram_capacity", "four"),
        ("dram_capacity", 0),
        ("dram_capacity", -1),
        ("dram_capacity", float("nan")),
        ("dram_capacity", float("inf")),
        ("dram_capacity", True),
        ("dram_capacity", [1]),
        ("ssd_enabled", "perhaps"),
        ("io_threads", True),
        ("io_threads", 0),
        ("io_threads", 1.5),
        ("io_threads", 100_000),
        ("load_timeout_s", 0),
        ("load_timeout_s", "soon"),
        ("lookup_timeout_ms", -1),
        ("load_failure_policy", "retry"),
        ("dram_numa_node", -2),
        ("log_level", "loud"),
        ("plugins", 5),
        ("mode", "cloud"),
        ("namespace", ["a"]),
    ],
)
@pytest.mark.statement("connector", 93)
def test_ill_typed_value_names_key_value_and_source(key: str, value: object) -> None:
    text = problems_of(extra={key: value})
    assert re.search(rf"^  - {key} = {re.escape(repr(value))} from engine extra-config: \S", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("max_concurrent_loads", 4),
        ("max_concurrent_stores", 4),
        ("max_concurrent_demotions", 2),
        ("max_transfer_blocks", 16),
    ],
)
@pytest.mark.statement("connector", 45)
def test_limits_of_transfers_have_defaults_and_nonsense_is_refused(key: str, default: int) -> None:
    assert getattr(resolve({}, {}).config, key) == default
    assert getattr(resolve({key: 7}, {}).config, key) == 7
    for value in (0, -1, 1.5, "many", True, float("nan")):
        assert f"  - {key} = {value!r} from engine extra-config" in problems_of(extra={key: value})


def test_a_mode_that_nobody_knows_is_refused() -> None:
    assert "the modes are 'local', 'daemon' and" in problems_of(env={"UMBP_MODE": "cloud"})
    assert resolve(env={"UMBP_MODE": "distributed"}).config.mode == "distributed", "a plug-in may make its client"


def test_all_problems_are_told_at_once() -> None:
    text = problems_of(extra={"io_threads": 0, "nope": 1}, env={"UMBP_LOG_LEVEL": "loud"})
    assert len(text.splitlines()) == 4


def test_ssd_without_a_folder_names_the_source() -> None:
    text = problems_of(env={"UMBP_SSD_ENABLED": "1"})
    assert "ssd_dir is not set" in text
    assert "environment UMBP_SSD_ENABLED" in text


@pytest.mark.parametrize(
    ("env", "active"),
    [
        ({}, False),
        ({"UMBP_SSD_DIR": "/x"}, True),
        ({"UMBP_SSD_DIR": "/x", "UMBP_SSD_ENABLED": "0"}, False),
        ({"UMBP_SSD_DIR": "/x", "UMBP_SSD_ENABLED": "1"}, True),
        ({"UMBP_SSD_ENABLED": "0"}, False),
    ],
)
def test_ssd_tier_is_on_when_it_has_a_folder(env: dict[str, str], active: bool) -> None:
    assert resolve({}, env).config.ssd_active is active


def test_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    assert "cannot be read" in problems_of(file=tmp_path / "missing.toml")
    assert "is not TOML" in problems_of(file=toml(tmp_path, "io_threads = = 1"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "is not TOML" in problems_of(file=tmp_path / "binary.toml")


def test_a_file_names_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "umbp.toml"
    path.write_text('config_file = "other.toml"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="a file names no other one; leave it out"):
        resolve({}, {}, path)


def test_variables_of_the_original_and_of_the_platform_are_not_ours() -> None:
    env = dict.fromkeys(FOREIGN, "1") | {
        "UMBP_SPDK_PROXY_SHM": "x",
        "UMBP_REDIS_URI": "tcp://127.0.0.1:6379",
        "UMBP_MASTER_SERVICE_HOST": "10.0.0.1",
        "UMBP_MASTER_PORT": "tcp://10.0.0.1:1",
        "UMBP_MASTER_PORT_50051_TCP_ADDR": "10.0.0.1",
        "UMBP_SERVICE_HOST": "10.0.0.1",
        "UMBP_SERVICE_PORT": "50051",
        "UMBP_SERVICE_PORT_GRPC": "50051",
        "UMBP_PORT": "tcp://10.0.0.1:50051",
        "UMBP_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "UMBP_PORT_50051_TCP_PROTO": "tcp",
        "UMBP_VLLM_NO_CLI_HOOK": "1",
    }
    assert resolve({}, env).config == UmbpConfig()


def test_no_foreign_name_hides_a_key() -> None:
    assert not {UmbpConfig.env_name(key) for key in KEYS} & FOREIGN


@pytest.mark.parametrize(
    "names", [("UMBP_SSD_HIGH_WM", "UMBP_SSD_LOW_WM"), ("UMBP_SSD_HIGH_WATERMARK", "UMBP_SSD_LOW_WM")]
)
def test_watermarks_have_the_names_of_the_original_too(names: tuple[str, str]) -> None:
    config = resolve({}, dict(zip(names, ("0.9", "0.7"), strict=True))).config
    assert (config.ssd_high_watermark, config.ssd_low_watermark) == (0.9, 0.7)
    assert (config.dram_high_watermark, config.dram_low_watermark) == (None, None)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"dram_high_watermark": 0.5, "dram_low_watermark": 0.6}, "the low one not above the high one"),
        ({"ssd_low_watermark": 0.6}, "ssd_low_watermark 0.6 is above ssd_high_watermark or that is not set"),
        ({"ssd_high_watermark": 1.5}, "ssd_high_watermark"),
        ({"dram_high_watermark": 0}, "dram_high_watermark"),
        ({"dram_high_watermark": True}, "a number is wanted"),
    ],
)
def test_watermarks_that_cannot_be(values: dict[str, object], problem: str) -> None:
    assert problem in problems_of(extra=values)


@pytest.mark.parametrize(("value", "level"), [("0", "info"), (1, "warning"), ("2", "error"), ("WARN", "warning")])
def test_log_level_takes_numbers_of_the_original(value: object, level: str) -> None:
    assert resolve({"log_level": value}, {}).config.log_level == level


def test_plugins_are_a_list_of_names() -> None:
    assert resolve({}, {"UMBP_PLUGINS": " a, b,,"}).config.plugins == ("a", "b")
    assert resolve({"plugins": ["a"]}, {}).config.plugins == ("a",)


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve({"ssd_dir": "cache"}, {}).config.ssd_dir == tmp_path / "cache"
    assert resolve({"ssd_dir": "~/cache"}, {}).config.ssd_dir == Path("/home/someone/cache")


def test_configuration_is_frozen() -> None:
    config = UmbpConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.io_threads = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("123", 123),
        ("1K", 1024),
        ("1kb", 1000),
        ("1KiB", 1024),
        ("500MB", 500_000_000),
        ("4GiB", 4 * GIB),
        ("4 gib", 4 * GIB),
        ("4G", 4 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("2TB", 2 * 10**12),
        ("7B", 7),
        (12.9, 12),
    ],
)
def test_sizes(text: object, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "G", "4 G B", "-4G", "1e9", "4GiBs", "4,5G", None, True])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="a size is"):
        parse_size(text)


@given(st.integers(1, 1 << 50), st.sampled_from(["KiB", "MiB", "GiB", "KB", "MB", "GB", "K", "M", "G", "B", ""]))
def test_whole_numbers_of_any_unit_are_exact(number: int, unit: str) -> None:
    base = 1000 if unit.endswith("B") and not unit.endswith("iB") else 1024
    power = "BKMG".index(unit[0]) if unit else 0
    assert parse_size(f"{number}{unit}") == number * base**power


@given(st.dictionaries(st.sampled_from(KEYS), st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8))))
def test_whatever_is_given_the_answer_is_a_configuration_or_a_config_error(extra: dict[str, object]) -> None:
    extra.pop("config_file", None)
    try:
        outcome: object = set(resolve(extra, {}).origins)
    except ConfigError as error:
        outcome = str(error).splitlines()[0]
    assert outcome in (set(KEYS), "the configuration of umbp cannot be used:")
