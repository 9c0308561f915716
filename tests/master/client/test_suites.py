"""The public conformance suites, run against a real master through each of its doors, and against the bare state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.master.app.master_process import MasterProcess
from tests.master.client.fake_network import GRPC, NATIVE, FakeNetwork
from umbp_connectors.client.addresses import parse_addresses
from umbp_connectors.client.dial import Dialer
from umbp_core.master.transport import MasterTransport
from umbp_core.testing.suite_master import MasterSuite
from umbp_core.testing.suite_native import NativeMasterSuite

PATIENCE = 60.0


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("master")
    with MasterProcess(folder, f"--native-socket={folder / 'm.sock'}", "--metadata-backend=none") as running:
        yield running.doors


def through(address: str) -> Iterator[MasterTransport]:
    with closing(Dialer()(parse_addresses(address)[0], PATIENCE)) as transport:
        yield transport


class TestGrpcDoor(MasterSuite):
    """By UMBP's wire."""

    @pytest.fixture
    def transport(self, doors: dict[str, str]) -> Iterator[MasterTransport]:
        yield from through(f"grpc://{doors['grpc']}")


class TestNativeDoor(NativeMasterSuite):
    """By the native protocol over TCP."""

    @pytest.fixture
    def transport(self, doors: dict[str, str]) -> Iterator[MasterTransport]:
        yield from through(f"umbp://{doors['native']}")


class TestUnixDoor(NativeMasterSuite):
    """By the native protocol over a Unix socket."""

    @pytest.fixture
    def transport(self, doors: dict[str, str]) -> Iterator[MasterTransport]:
        yield from through(f"umbp+unix://{doors['socket']}")


class TestFakeNetwork(NativeMasterSuite):
    """The fake that other tests here rely on answers as a real one does."""

    @pytest.fixture
    def transport(self) -> MasterTransport:
        return FakeNetwork().dial(NATIVE, 1.0)


class TestPlainFakeNetwork(MasterSuite):
    """The same by its other door."""

    @pytest.fixture
    def transport(self) -> MasterTransport:
        return FakeNetwork().dial(GRPC, 1.0)
