"""A real master knows what the host's daemon holds: at the node of every engine that uses it, hash by hash."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.waiting import until
from tests.master.app.master_process import CALL, MasterProcess
from tests.vllm.engine_free.test_host_daemon import Host
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.host import HostHarness
from tests.vllm.harness.reported import Held, counting, in_all_groups, published, reporter_of
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_connectors.daemon.heard import HeardPool
from umbp_connectors.daemon.news import Listed
from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.ids import block_key
from umbp_core.tiers import Tier
from umbp_vllm.groups import KvGroup
from umbp_vllm.published import HEX, GroupWords
from umbp_vllm.reporting import HostTeller, PoolMirror

FULL = (GroupSpec("full"),)
HYBRID = (GroupSpec("full"), GroupSpec("window", window=10))
NOTHING: Held = {Tier.DRAM: set(), Tier.SSD: set()}


def tokens(seed: int) -> list[int]:
    """A prompt that shares no block with one of another seed."""
    return [(17 * index + 29 * seed) % 900 for index in range(40)]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MasterProcess]:
    with MasterProcess(tmp_path_factory.mktemp("master")) as process:
        yield process


@pytest.fixture
def master(process: MasterProcess) -> Iterator[NativeBlockingClient]:
    client = process.native()
    yield client
    client.close()


@pytest.fixture
def host(tmp_path: Path, process: MasterProcess) -> Iterator[Host]:
    """A host whose daemons have an SSD, and whose engines report."""
    host = Host(tmp_path)
    host.config.update(dram_capacity="192KiB", ssd_dir=tmp_path / "ssd", ssd_capacity="16MiB")
    yield host
    host.close()


def in_daemon(daemon: Daemon, engine: HostHarness) -> Held:
    """What its only pool holds, as ``engine`` publishes it."""
    (kept,) = daemon.keeper.pools()
    groups = counting(engine.scheduler.kv_cache_manager.kv_cache_config)
    return {tier: in_all_groups(keys, groups) for tier, keys in kept.pool.holdings().items()}


def room_in(daemon: Daemon) -> dict[int, tuple[int, int]]:
    """Bytes that there are and bytes that are free in its only pool, by tier."""
    (kept,) = daemon.keeper.pools()
    there = {int(tier): stats for tier in NOTHING if (stats := kept.pool.stats(tier)) is not None}
    return {
        tier: (stats.total_pages * kept.page_bytes, stats.free_pages * kept.page_bytes) for tier, stats in there.items()
    }


def room_told(engine: HostHarness) -> dict[int, tuple[int, int]]:
    """The same, as the next heartbeat would tell the master."""
    told = reporter_of(engine.leader)._capacities
    assert told is not None
    return {each.tier: (each.total, each.available) for each in told() if each.tier in NOTHING}


def on_ssd(daemon: Daemon) -> None:
    """Wait until nothing is on its way there."""
    (kept,) = daemon.keeper.pools()
    assert kept.pool.flush(30)


@pytest.mark.parametrize(("tp", "groups"), [(1, FULL), (2, FULL), (1, HYBRID)], ids=["one", "ranks", "groups"])
def test_every_engine_tells_what_the_daemon_holds(
    host: Host, process: MasterProcess, master: NativeBlockingClient, tp: int, groups: tuple[GroupSpec, ...]
) -> None:
    address = f"umbp://{process.doors['native']}"

    def engine(name: str) -> HostHarness:
        return host.engine(extra={"master_address": address, "node_id": name}, tp=tp, groups=groups)

    def known(name: str) -> Held:
        return {tier: set(master.list_blocks(name, tier, 0, 1000, CALL).hashes) for tier in NOTHING}

    daemon = host.daemon()
    one = engine("one")
    for seed in range(12):
        one.store(tokens(seed))
    on_ssd(daemon)
    until(lambda: known("one") == in_daemon(daemon, one))
    sizes = {tier: len(keys) for tier, keys in known("one").items()}
    assert 0 < sizes[Tier.DRAM] < 120, "of 12 prompts with 10 blocks each some are evicted"
    assert sizes[Tier.SSD] > 0
    two = engine("two")
    until(lambda: known("two") == in_daemon(daemon, two))
    two.store(tokens(99))
    on_ssd(daemon)
    until(lambda: known("one") == known("two") == in_daemon(daemon, one))
    there = known("one")[Tier.SSD]
    assert {published(key[:-4]) for key in two.keys(tokens(99))[0]} & there
    assert len(room_in(daemon)) == 2
    until(lambda: room_told(one) == room_in(daemon) == room_told(two))
    daemon.close()
    until(lambda: known("one") == NOTHING == known("two"))
    until(lambda: room_told(one) == {} == room_told(two))
    again = host.daemon()
    until(lambda: known("one")[Tier.SSD] >= there)  # before any request: the engines came back for this alone
    until(lambda: known("one") == known("two") == in_daemon(again, one))
    assert one.scheduler.reset_connector_cache()
    until(lambda: known("one") == NOTHING == known("two"))


def test_when_too_much_waits_everything_that_was_heard_is_told() -> None:
    feeds: list[Feed[Any]] = []

    class Reporter:
        def feed(self, source: str, decode: Callable[[Any], Iterable[Word]], resync: Callable[[], Any]) -> Feed[Any]:
            feeds.append(Feed(source, decode, resync, threading.Event(), max_waiting=2))
            return feeds[-1]

    words = GroupWords([KvGroup(0, 4, 1, reach=None, chunk=None, volatile_tail=False)], HEX)
    teller = HostTeller(Reporter(), PoolMirror(words).decode)  # type: ignore[arg-type]
    heard = HeardPool()
    for number in range(3):
        changes = heard.take(Listed(Tier.SSD, [block_key(bytes([part]) * 32, 0) for part in range(number + 1)], True))
        teller.changed(changes, heard.holdings)
    (feed,) = feeds
    told = [word for item in feed.take().items for word in feed.decode(item)]
    everything = [bytes([part]).hex().encode() * 32 for part in range(3)]
    assert [(word.kind, word.tier, sorted(word.hashes)) for word in told] == [
        (WordKind.REPLACE, Tier.DRAM, []),
        (WordKind.REPLACE, Tier.SSD, everything),
    ]
