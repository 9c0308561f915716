"""Connecting: what is missing or wrong is said in one sentence, and never raises anything but a ``MasterError``."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from umbp_connectors.client.addresses import MasterAddress, Wire, parse_addresses
from umbp_connectors.client.dial import ClientTls, Dialer
from umbp_core.errors import ConfigError, MasterError, MasterUnavailable

CERTS = Path(__file__).resolve().parents[1] / "certs"
NATIVE = MasterAddress(Wire.NATIVE_TCP, "127.0.0.1", 9)
GRPC = MasterAddress(Wire.GRPC, "127.0.0.1", 9)
EVERY_WIRE = pytest.mark.parametrize("wire", ["umbp", "grpc"])


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of somebody who takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(ConfigError, match="come together"):
        ClientTls(certificate=CERTS / "client.pem")


@pytest.mark.parametrize("address", [NATIVE, GRPC], ids=str)
def test_files_that_are_not_there_are_named(tmp_path: Path, address: MasterAddress) -> None:
    with pytest.raises(MasterUnavailable, match=r"TLS files .* cannot be .*No such file"):
        Dialer(tls=ClientTls(ca=tmp_path / "none.pem"))(address, 1.0)


def test_without_the_packages_of_grpc_their_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("umbp_connectors.wire_grpc")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "umbp_connectors.client.grpc_transport", raising=False)
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(MasterUnavailable, match=r"umbp-connectors\[grpc\]"):
        Dialer()(GRPC, 1.0)


@EVERY_WIRE
def test_nobody_there_is_no_surprise(wire: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(MasterError, match=str(port)):
        Dialer()(parse_addresses(f"{wire}://127.0.0.1:{port}")[0], 0.5)


@EVERY_WIRE
def test_somebody_silent_costs_the_deadline(wire: str, silent: int) -> None:
    with pytest.raises(MasterUnavailable, match=str(silent)):
        Dialer()(parse_addresses(f"{wire}://127.0.0.1:{silent}")[0], 0.2)


def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MasterUnavailable, match=r"none\.sock"):
        Dialer()(parse_addresses(f"umbp+unix://{tmp_path / 'none.sock'}")[0], 0.5)
