"""The example of a third party's tier: it passes the shipped suite, a pool uses it, and it installs as a plug-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from examples.fsspec_tier.umbp_fsspec import URL
from umbp_connectors.config import resolve
from umbp_connectors.hookspecs import ClientSpec, SsdTierSpec
from umbp_connectors.plugins import PluginHost, create_manager
from umbp_connectors.tier_ports import PoolClient, SsdTier
from umbp_core.errors import TierUnavailable
from umbp_core.ids import Identity, RankScope
from umbp_core.outcomes import GetStatus, PutStatus
from umbp_core.testing.suite_tier import SsdTierSuite
from umbp_core.tiers import Tier

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "fsspec_tier"
ENTRY = EntryPoint("fsspec", "examples.fsspec_tier.umbp_fsspec", "umbp")
SIZE = 32 << 10
KEYS = [b"key %d" % number for number in range(12)]


def host_of(folder: Path, capacity: int) -> PluginHost:
    extra = {"ssd_dir": str(folder), "ssd_capacity": capacity, "dram_capacity": 4 * SIZE, "dram_prefault": False}
    return create_manager(resolve(extra, env={}).config, entries=[ENTRY])


@dataclass(frozen=True)
class Opener:
    """Opens the tier through the hook, in whatever process."""

    folder: Path

    def __call__(self, slot_bytes: int, slots: int) -> SsdTier:
        os.environ[URL] = f"file://{self.folder}/store"
        host = host_of(self.folder / "host", slots * slot_bytes)
        return host.make_ssd_tier(SsdTierSpec("model", b"\x11" * 32, slot_bytes))


class TestObjectTier(SsdTierSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opener:
        monkeypatch.setenv(URL, "")  # put back at the end
        return Opener(tmp_path)


class ObjectStore(MemoryFileSystem):
    """As S3 is: without folders, and without a list of what is not there."""

    protocol = "umbp-objects"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing to make."""

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        found = [name for name in self.store if name.startswith(self._strip_protocol(path).rstrip("/") + "/")]
        if not found:
            raise FileNotFoundError(path)
        return [self.info(name) for name in found] if detail else found


@pytest.fixture(params=["memory://umbp-test/kv", "umbp-objects://bucket/kv", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the store is."""
    url = f"file://{tmp_path}/store" if request.param == "file" else request.param
    monkeypatch.setenv(URL, url)
    fsspec.register_implementation(ObjectStore.protocol, ObjectStore, clobber=True)
    yield url
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm(path, recursive=True)


@pytest.fixture
def open_pool(url: str, tmp_path: Path) -> Iterator[Callable[[], PoolClient]]:
    made: list[PoolClient] = []

    def open_pool() -> PoolClient:
        host = host_of(tmp_path / "host", 20 * SIZE)
        made.append(host.make_client(ClientSpec(Identity("model", b"\x11" * 32, RankScope()), SIZE)))
        return made[-1]

    yield open_pool
    for pool in made:
        pool.close()


def object_of(key: bytes) -> bytes:
    return (key * SIZE)[:SIZE]


def statuses_of(pool: PoolClient) -> list[GetStatus]:
    """Read everything, and compare what comes."""
    buffers = [np.zeros(SIZE, dtype=np.uint8) for _ in KEYS]
    statuses = pool.get(KEYS, buffers)
    for key, buffer, status in zip(KEYS, buffers, statuses, strict=True):
        assert not status.hit or buffer.tobytes() == object_of(key)
    return statuses


def test_a_pool_keeps_its_objects_there_over_a_restart(open_pool: Callable[[], PoolClient], url: str) -> None:
    pool = open_pool()
    for start in range(0, len(KEYS), 4):
        part = KEYS[start : start + 4]
        assert pool.put(part, [object_of(key) for key in part]) == [PutStatus.STORED] * 4
        assert pool.flush(30)
    fs, path = fsspec.core.url_to_fs(url)
    assert len(fs.find(path)) == len(KEYS)
    pool.close()
    pool = open_pool()
    stats = pool.stats(Tier.SSD)
    assert stats is not None
    assert (stats.objects, stats.total_pages) == (len(KEYS), 20)
    assert pool.count_prefix(KEYS) == len(KEYS)
    assert statuses_of(pool) == [GetStatus.SSD] * len(KEYS)


def test_objects_that_somebody_removed_or_changed_are_misses(open_pool: Callable[[], PoolClient], url: str) -> None:
    pool = open_pool()
    pool.put(KEYS[:4], [object_of(key) for key in KEYS[:4]])
    assert pool.flush(30)
    pool.close()
    fs, path = fsspec.core.url_to_fs(url)
    gone, torn, flipped, _ = sorted(fs.find(path))
    fs.rm_file(gone)
    fs.pipe_file(torn, fs.cat_file(torn)[:100])
    fs.pipe_file(flipped, b"?" + fs.cat_file(flipped)[1:])
    statuses = statuses_of(open_pool())
    assert sorted(status.value for status in statuses[:4]) == ["corrupt", "corrupt", "corrupt", "ssd"]


def test_a_store_that_cannot_be_reached_costs_the_tier_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(URL, "nonsense://there")
    host = host_of(tmp_path / "host", 20 * SIZE)
    with pytest.raises(TierUnavailable, match="nonsense://there"):
        host.make_ssd_tier(SsdTierSpec("model", b"\x11" * 32, SIZE))
    with closing(host.make_client(ClientSpec(Identity("model", b"\x11" * 32, RankScope()), SIZE))) as pool:
        assert pool.stats(Tier.SSD) is None
        assert pool.put(KEYS[:1], [object_of(KEYS[0])]) == [PutStatus.STORED]
    assert caplog.text.count("the SSD tier is off") == 1


def test_without_a_url_the_slab_file_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL, raising=False)
    with closing(host_of(tmp_path, 4 << 20).make_ssd_tier(SsdTierSpec("model", b"\x11" * 32, SIZE))):
        assert list(tmp_path.rglob("slab-*.bin"))


def test_it_installs_as_a_plug_in(tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    options = ["--disable-pip-version-check", "--root-user-action=ignore", str(EXAMPLE)]
    subprocess.run([sys.executable, *install, str(target), *options], check=True, timeout=600)
    script = (
        "import json; from umbp_connectors import resolve; from umbp_connectors.plugins import create_manager\n"
        "host = create_manager(resolve(env={}).config); print(json.dumps([host.names, len(host.failures)]))"
    )
    path = os.pathsep.join([str(target), *(part for part in sys.path if part)])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["builtin", "fsspec"], 0]
