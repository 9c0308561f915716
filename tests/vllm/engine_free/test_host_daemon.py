"""The engine over the real daemon's server and its real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.waiting import until
from tests.vllm.engine_free.test_host import STAGED, STAGED_IDS, UNEVEN
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.host import HostHarness
from umbp_connectors.daemon.messages import HELD
from umbp_connectors.pool.outcomes import GetStatus
from umbp_core.tiers import Tier

PROMPT = list(range(1, 97))
OTHER = list(range(200, 296))


class Host:
    """Daemons one after the other at one socket, and the engines that use them."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "run" / "daemon.sock"
        self.config: dict[str, Any] = {"dram_capacity": "32MiB"}
        self.daemons: list[Daemon] = []
        self.engines: list[HostHarness] = []

    def daemon(self) -> Daemon:
        """Start one."""
        self.daemons.append(Daemon(self.socket, **self.config))
        return self.daemons[-1]

    def engine(self, **options: Any) -> HostHarness:
        """Start one."""
        extra = {"daemon_socket": str(self.socket), "dram_capacity": "8MiB", **options.pop("extra", {})}
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


@pytest.mark.parametrize("options", [{}, {"tp": 2}, *STAGED], ids=["one", "tp2", *STAGED_IDS])
def test_what_an_engine_that_is_gone_stored_the_next_one_loads(host: Host, options: dict[str, Any]) -> None:
    daemon = host.daemon()
    first = host.engine(**options)
    first.store(PROMPT)
    first.close()
    host.engines.clear()
    until(lambda: daemon.pinned() == 0)
    assert host.engine(**options).hits(PROMPT) >= len(PROMPT) - 4


def test_more_requests_with_hits_than_loans_all_load(host: Host) -> None:
    """Those that are too many wait until the others have loaded; the daemon lends to the last as to the first."""
    host.config["dram_capacity"] = "64MiB"
    daemon = host.daemon()
    extra = {"dram_capacity": "32MiB"}
    engine = host.engine(extra=extra, num_blocks=400, max_num_seqs=64, max_num_batched_tokens=1024)
    engine.step_until(engine.is_attached)
    prompts = [[number // 30, 100 + number % 30, *range(200, 211)] for number in range(HELD + 44)]
    for start in range(0, len(prompts), 10):
        for prompt in prompts[start : start + 10]:
            engine.add(prompt, max_tokens=1)
        engine.drain()
    (kept,) = daemon.keeper.pools()
    assert len(dict(kept.pool.copies(Tier.DRAM))) == 3 * len(prompts)
    assert engine.reset_prefix_cache()
    before = engine.stat("hit_tokens", "dram")
    for prompt in prompts:
        engine.add(prompt, max_tokens=1)
    engine.run_until_finished()
    assert engine.stat("hit_tokens", "dram") - before == 12 * len(prompts)
    assert [engine.stat("degraded", reason) for reason in ("daemon_gone", "daemon_late", "too_many_loans")] == [0, 0, 0]
    engine.drain()
    assert kept.lent[GetStatus.DRAM] == 3 * len(prompts)


def test_stages_that_are_divided_in_another_way_share_nothing(host: Host) -> None:
    host.daemon()
    host.engine(**UNEVEN).store(PROMPT)
    even = {**UNEVEN, "groups": (GroupSpec(layers=4, heads=4, head_size=64),)}
    for other in (even, {**UNEVEN, "pp": 1}, {**UNEVEN, "pp": 1, "tp": 2}):
        assert host.engine(**other).hits(PROMPT) == 0


def test_a_part_that_changed_is_computed_again(host: Host) -> None:
    """In the last stage's part, whose bytes alone differ."""
    daemon = host.daemon()
    engine = host.engine(**UNEVEN)
    engine.store(PROMPT)
    (kept,) = daemon.keeper.pools()
    last = engine.ranks[-1].connector._worker.engine._tools  # type: ignore[attr-defined]
    key = engine.keys(PROMPT)[0][3]
    (page,) = dict(kept.pool.copies(Tier.DRAM))[key].pages
    last.pages.page(page)[5] ^= 1
    engine.expects_internal_failures = True
    engine.hits(PROMPT)
    assert engine.stat("failed_blocks", "load", "verify") == 1


@pytest.mark.parametrize("options", [{"tp": 2}, UNEVEN], ids=["tp2", "uneven"])
def test_another_daemon_finds_on_ssd_what_the_first_one_had(
    host: Host, tmp_path: Path, options: dict[str, Any]
) -> None:
    host.config.update(ssd_dir=tmp_path / "ssd", ssd_capacity="16MiB")
    host.daemon()
    engine = host.engine(**options)
    engine.store(PROMPT)
    host.daemons.pop().close()
    assert engine.hits(PROMPT) == 0
    host.daemon()
    engine.step_until(engine.is_attached)
    engine.drain()
    assert engine.reset_prefix_cache()
    assert engine.hits(PROMPT) >= len(PROMPT) - 4
