"""A master per test, with a door on a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.master.native.harness import Master, RawClient, client, master
from umbp_connectors.client.native_blocking import NativeBlockingClient


@pytest.fixture(params=["asyncio", "uvloop"])
def running(request: pytest.FixtureRequest) -> Iterator[Master]:
    loops = asyncio if request.param == "asyncio" else pytest.importorskip("uvloop")
    with master(loops.new_event_loop()) as it:
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
