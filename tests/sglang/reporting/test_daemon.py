"""Pages of L3 that the host's daemon holds are told to the master as those of a pool of the engine's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.reporting.at_master import DRAM, HBM, SSD, Held, known_at
from tests.connectors.waiting import until
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.shapes import FULL, prompt_of
from tests.sglang.reporting.conftest import Start
from tests.sglang.reporting.rig import NODE, Reported, published

FIRST, SECOND = prompt_of(FULL, 6), prompt_of(FULL, 4, 500)
SALTED = Prompt(prompt_of(FULL, 3, 900).tokens, cache_salt="salt")
OTHER = "another node"


def ids(*prompts: Prompt) -> set[bytes]:
    return {name for prompt in prompts for name in published(prompt, FULL.page_size)}


def knows(node: Reported, name: str, held: Held) -> bool:
    node.step()
    return known_at(node.master, name) == held


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[[], Daemon]]:
    """Starts a daemon; a second one takes the place of the first, which must be closed."""
    with contextlib.ExitStack() as closing:

        def daemon() -> Daemon:
            ssd = {"ssd_dir": tmp_path / "ssd", "ssd_capacity": 64 << 20}
            started = Daemon(tmp_path / "run" / "daemon.sock", dram_capacity=64 << 20, **ssd)
            closing.callback(started.close)
            return started

        yield daemon


@pytest.fixture
def over(tmp_path: Path) -> dict[str, Any]:
    """What makes an engine use it."""
    socket = str(tmp_path / "run" / "daemon.sock")
    return {"mode": "daemon", "daemon_socket": socket, "call_timeout_ms": 30_000}


def offload(node: Reported, *prompts: Prompt) -> None:
    node.knows(prompts)
    for prompt in prompts:
        node.engine.compute(prompt)
        node.engine.offload(prompt)


def test_each_engine_tells_what_the_daemon_holds(
    start: Start, daemon: Callable[[], Daemon], over: dict[str, Any]
) -> None:
    first_daemon = daemon()
    one = start(extra=over)
    offload(one, FIRST, SALTED)
    both = ids(FIRST, SALTED)
    until(lambda: knows(one, NODE, {HBM: both, DRAM: both, SSD: both}))
    one.engine.flush()
    until(lambda: knows(one, NODE, {DRAM: both, SSD: both}))
    two = start(extra={**over, "node_id": OTHER})
    until(lambda: ids(FIRST) <= known_at(two.master, OTHER).get(SSD, set()))
    offload(two, SECOND)
    until(lambda: knows(one, NODE, {DRAM: both | ids(SECOND), SSD: both | ids(SECOND)}))
    first_daemon.close()
    until(lambda: knows(one, NODE, {}))
    daemon()
    until(lambda: knows(one, NODE, {SSD: both | ids(SECOND)}))
    two.engine.backend.clear()
    until(lambda: knows(one, NODE, {}))
    until(lambda: SSD not in known_at(two.master, OTHER))
    assert one.assert_equal() == {}
