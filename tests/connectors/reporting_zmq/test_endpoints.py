"""Where to find a stream, from what the engine was told."""

import pytest

from umbp_connectors.reporting.zmq_endpoints import endpoint_of
from umbp_core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "rank", "bind", "endpoint"),
    [
        ("tcp://*:5557", 0, False, "tcp://127.0.0.1:5557"),
        ("tcp://0.0.0.0:5557", 2, False, "tcp://127.0.0.1:5559"),
        ("tcp://[::]:5557", 0, False, "tcp://[::1]:5557"),
        ("tcp://:::5557", 0, False, "tcp://[::1]:5557"),
        ("tcp://gpu-7.example:5557", 3, False, "tcp://gpu-7.example:5560"),
        ("tcp://[fe80::1]:5557", 0, False, "tcp://[fe80::1]:5557"),
        ("tcp://*:5557", 1, True, "tcp://*:5558"),
        ("tcp://10.0.0.1:5557", 0, True, "tcp://10.0.0.1:5557"),
        ("ipc:///run/kv-events", 0, False, "ipc:///run/kv-events"),
    ],
)
def test_what_the_engine_was_told_is_enough(text: str, rank: int, bind: bool, endpoint: str) -> None:
    assert endpoint_of(text, rank, bind) == endpoint


@pytest.mark.parametrize(
    ("text", "rank", "sentence"),
    [
        ("inproc://cache", 0, "stays inside the engine's process"),
        ("http://h:1", 0, "give tcp://HOST:PORT or ipc://PATH"),
        ("tcp://h", 0, "give tcp://HOST:PORT"),
        ("tcp://*:*", 0, "give tcp://HOST:PORT"),
        ("ipc://", 0, "give tcp://HOST:PORT or ipc://PATH"),
        ("ipc:///run/kv-events", 1, "rank 1 needs its own"),
        ("tcp://*:0", 0, "has the port 0"),
        ("tcp://*:0", 1, "has the port 1"),
        ("tcp://*:65535", 1, "has the port 65536"),
    ],
)
def test_what_cannot_be_reached_is_refused(text: str, rank: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        endpoint_of(text, rank)
