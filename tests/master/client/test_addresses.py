"""Where a master is."""

from __future__ import annotations

import pytest

from umbp_connectors.client.addresses import MasterAddress, Wire, parse_addresses
from umbp_core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("umbp://host:7000", MasterAddress(Wire.NATIVE_TCP, "host", 7000)),
        ("UMBP://10.0.0.1:1/", MasterAddress(Wire.NATIVE_TCP, "10.0.0.1", 1)),
        ("grpc://a-b.example:65535", MasterAddress(Wire.GRPC, "a-b.example", 65535)),
        ("grpc://[::1]:50051", MasterAddress(Wire.GRPC, "::1", 50051)),
        ("umbp+unix:///run/umbp/m.sock", MasterAddress(Wire.NATIVE_UNIX, path="/run/umbp/m.sock")),
    ],
)
def test_an_address_names_one_door(text: str, address: MasterAddress) -> None:
    assert parse_addresses(f" {text} ") == (address,)
    assert parse_addresses(str(address)) == (address,)


def test_an_address_without_a_scheme_may_be_either_door() -> None:
    assert parse_addresses("host:50051") == (
        MasterAddress(Wire.NATIVE_TCP, "host", 50051),
        MasterAddress(Wire.GRPC, "host", 50051),
    )


def test_several_come_in_the_order_of_preference_and_once() -> None:
    found = parse_addresses("umbp+unix:///m.sock, umbp://host:1, host:1,")
    assert list(map(str, found)) == ["umbp+unix:///m.sock", "umbp://host:1", "grpc://host:1"]


def test_a_host_of_the_sixth_version_stands_in_brackets() -> None:
    (address,) = parse_addresses("umbp://[fe80::1]:7")
    assert (address.host, address.target, str(address)) == ("fe80::1", "[fe80::1]:7", "umbp://[fe80::1]:7")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " , ",
        "http://host:1",
        "host",
        "host:",
        ":1",
        "host:0",
        "host:65536",
        "host:-1",
        "umbp://host",
        "umbp://host:1/path",
        "umbp://user@host:1",
        "::1:50051",
        "umbp+unix://relative.sock",
        "umbp+unix:///" + "x" * 107,
        "grpc://ho st:1",
    ],
)
def test_what_is_not_understood_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"umbp\+unix:///|umbp://|shorter"):
        parse_addresses(text)
