"""The engine over a daemon's port instead of its Unix socket."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.waiting import until
from tests.vllm.harness.host import HostHarness

PROMPT = list(range(1, 97))
TOKEN = "of-the-host"


@pytest.mark.parametrize("options", [{}, {"tp": 2}], ids=["one", "tp2"])
def test_what_was_stored_over_tcp_is_loaded_over_either_door(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "run" / "daemon.sock"
    tcp = {"daemon_listen": "127.0.0.1:0", "daemon_token": TOKEN}
    with contextlib.ExitStack() as ending:
        daemon = Daemon(path, dram_capacity="32MiB", **tcp)
        ending.callback(daemon.close)

        def engine(**extra: str) -> HostHarness:
            made = HostHarness(None, {"dram_capacity": "8MiB", **extra}, **options)
            ending.callback(made.close)
            return made

        over_tcp = {"daemon_address": str(daemon.server.endpoint), "daemon_token": TOKEN}
        first = engine(**over_tcp)
        first.store(PROMPT)
        first.close()
        until(lambda: daemon.pinned() == 0)
        assert engine(**over_tcp).hits(PROMPT) >= len(PROMPT) - 4
        assert engine(daemon_socket=str(path)).hits(PROMPT) >= len(PROMPT) - 4
