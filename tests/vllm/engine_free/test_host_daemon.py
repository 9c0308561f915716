"""The engine over the real daemon's server and its real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.waiting import until
from tests.vllm.harness.host import HostHarness

PROMPT = list(range(1, 97))
OTHER = list(range(200, 296))


class Host:
    """Daemons one after the other at one socket, and the engines that use them."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "run" / "daemon.sock"
        self.config: dict[str, Any] = {"dram_capacity": "8MiB"}
        self.daemons: list[Daemon] = []
        self.engines: list[HostHarness] = []

    def daemon(self) -> Daemon:
        """Start one."""
        self.daemons.append(Daemon(self.socket, **self.config))
        return self.daemons[-1]

    def engine(self, **options: Any) -> HostHarness:
        """Start one."""
        extra = {"daemon_socket": str(self.socket), **options.pop("extra", {})}
        self.engines.append(HostHarness(None, extra, **options))
        return self.engines[-1]

    def close(self) -> None:
        """End all."""
        for engine in self.engines:
            engine.close()
        for daemon in self.daemons:
            daemon.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host without a daemon yet."""
    host = Host(tmp_path)
    yield host
    host.close()


@pytest.mark.parametrize("tp", [1, 2])
def test_what_an_engine_that_is_gone_stored_the_next_one_loads(host: Host, tp: int) -> None:
    daemon = host.daemon()
    first = host.engine(tp=tp)
    first.store(PROMPT)
    first.close()
    host.engines.clear()
    until(lambda: daemon.pinned() == 0)
    assert host.engine(tp=tp).hits(PROMPT) >= len(PROMPT) - 4


def test_another_daemon_finds_on_ssd_what_the_first_one_had(host: Host, tmp_path: Path) -> None:
    host.config.update(ssd_dir=tmp_path / "ssd", ssd_capacity="16MiB")
    host.daemon()
    engine = host.engine(tp=2)
    engine.store(PROMPT)
    host.daemons.pop().close()
    assert engine.hits(PROMPT) == 0
    host.daemon()
    engine.step_until(engine.is_attached)
    engine.drain()
    assert engine.reset_prefix_cache()
    assert engine.hits(PROMPT) >= len(PROMPT) - 4
