"""The client interfaces over a daemon that serves: what is put through one life of a client is read by another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import PAGES, SIZE
from umbp_connectors import resolve
from umbp_connectors.compat import mori
from umbp_connectors.create import create_client
from umbp_connectors.daemon.settings import socket_path
from umbp_connectors.pool.umbp_client import Client
from umbp_core.errors import ConfigError
from umbp_core.ids import Identity, RankScope
from umbp_core.outcomes import DeploymentMode, GetStatus, PutStatus
from umbp_core.tiers import Tier

KEYS = [f"{number:064x}_0_k" for number in range(6)]
DATA = np.random.default_rng(11).integers(0, 256, (len(KEYS), SIZE), dtype=np.uint8)
MODEL = Identity("model", b"\x22" * 32, RankScope())


@pytest.fixture
def client(path: Path, closing: contextlib.ExitStack) -> Callable[[], Client]:
    """Makes one as a program does."""

    def make() -> Client:
        values = {
            "mode": "daemon",
            "daemon_socket": str(path),
            "dram_capacity": PAGES * SIZE,
            "dram_prefault": False,
            "call_timeout_ms": 30_000,
        }
        made = create_client(resolve(values, env={}).config, identity=MODEL, object_bytes=SIZE)
        closing.callback(made.close)
        return made

    return make


@pytest.fixture
def mori_client(path: Path, closing: contextlib.ExitStack, tmp_path: Path) -> Callable[..., mori.UMBPClient]:
    """Makes one with the original's names."""

    def make(address: str = f"unix://{path}", namespace: str = "a model") -> mori.UMBPClient:
        config = mori.UMBPConfig()
        config.dram.capacity_bytes, config.dram.prefault = PAGES * SIZE, False
        config.ssd.enabled, config.namespace = False, namespace
        config.standalone_process = mori.UMBPStandaloneProcessConfig(address)
        made = mori.UMBPClient(config)
        closing.callback(made.close)
        return made

    return make


def test_a_client_over_a_daemon(start: Callable[..., Daemon], client: Callable[[], Client], tmp_path: Path) -> None:
    start(ssd_dir=tmp_path / "ssd", ssd_capacity=8 << 20)
    first = client()
    assert (first.deployment_mode, first.is_distributed) == (DeploymentMode.DAEMON, False)
    assert first.batch_put_with_depth(KEYS, list(DATA), range(len(KEYS))) == [PutStatus.STORED] * len(KEYS)
    assert first.put(KEYS[0], DATA[1]) is PutStatus.PRESENT
    assert first.flush(30)
    stats = first.stats()
    assert [stats.tiers[tier].objects for tier in (Tier.DRAM, Tier.SSD)] == [len(KEYS)] * 2
    assert stats.counters.puts[PutStatus.STORED] == stats.counters.demoted == len(KEYS)
    first.close()
    second = client()
    assert second.batch_exists_consecutive([*KEYS, "another"]) == len(KEYS)
    assert second.batch_exists([*KEYS, "another"]) == [True] * len(KEYS) + [False]
    found = np.zeros_like(DATA)
    assert second.batch_get(KEYS, list(found)) == [GetStatus.DRAM] * len(KEYS)
    assert np.array_equal(found, DATA)
    assert second.get("another", found[0]) is GetStatus.MISS
    assert second.clear()
    assert not second.exists(KEYS[0])


def pointers(rows: np.ndarray) -> tuple[list[int], list[int]]:
    return [rows.ctypes.data + number * SIZE for number in range(len(rows))], [SIZE] * len(rows)


def test_the_mori_names_over_a_daemon(
    start: Callable[..., Daemon], mori_client: Callable[..., mori.UMBPClient], path: Path
) -> None:
    daemon = start()
    first = mori_client()
    assert (first.get_deployment_mode(), first.get_backend_mode()) == (
        mori.UMBPDeploymentMode.StandaloneProcess,
        "daemon",
    )
    assert first.batch_put_from_ptr(KEYS, *pointers(DATA)) == [True] * len(KEYS)
    assert first.flush()
    assert [kept.namespace for kept in daemon.keeper.pools()] == ["mori/a model"]
    first.close()
    second = mori_client(f"unix:{path}")
    found = np.zeros_like(DATA)
    assert second.batch_get_into_ptr(KEYS, *pointers(found)) == [False] * len(KEYS), "its size is not known yet"
    assert second.batch_put_from_ptr(KEYS[:1], *pointers(found[:1])) == [True], "the first writer wins"
    assert second.batch_exists_consecutive(KEYS) == len(KEYS)
    assert second.batch_get_into_ptr(KEYS, *pointers(found)) == [True] * len(KEYS)
    assert np.array_equal(found, DATA)
    other = mori_client(str(path), "another model")
    other.put_from_ptr(KEYS[5], DATA.ctypes.data, SIZE)
    assert other.batch_exists(KEYS) == [False] * 5 + [True]
    assert second.clear()
    assert (second.batch_exists(KEYS), other.exists(KEYS[5])) == ([False] * len(KEYS), True)


@pytest.mark.parametrize("address", ["127.0.0.1:50051", "unix:", "unix:run/x.sock", "unix://run/x.sock", "x.sock"])
def test_an_address_that_is_no_socket_is_refused(mori_client: Callable[..., mori.UMBPClient], address: str) -> None:
    with pytest.raises(ConfigError, match="is no Unix socket"):
        mori_client(address)


def test_an_empty_address_is_the_usual_place(
    mori_client: Callable[..., mori.UMBPClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "run"))
    path = socket_path(resolve({}, env={}).config)
    path.parent.mkdir(parents=True, mode=0o700)
    with contextlib.closing(Daemon(path)) as daemon:
        client = mori_client("")
        assert client.batch_put_from_ptr(KEYS, *pointers(DATA)) == [True] * len(KEYS)
        assert len(daemon.keeper.pools()) == 1
        client.close()
