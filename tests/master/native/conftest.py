"""A master per test, with a door on a Unix socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.master.native.harness import Master, RawClient, client, master
from umbp_connectors.client.native_blocking import NativeBlockingClient


@pytest.fixture
def running() -> Iterator[Master]:
    with master() as it:
        yield it


@pytest.fixture
def path(running: Master, tmp_path: Path) -> str:
    """The socket of a door without a token."""
    path = tmp_path / "door"
    running.serve(path)
    return str(path)


@pytest.fixture
def blocking(path: str) -> Iterator[NativeBlockingClient]:
    with client(path) as it:
        yield it


@pytest.fixture
def raw(path: str) -> Iterator[RawClient]:
    """A connection that has been greeted."""
    with RawClient(path) as it:
        it.greet()
        yield it
