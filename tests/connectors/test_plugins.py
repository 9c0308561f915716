"""The plug-in host: who is asked, in which order, and what a defective plug-in can(not) do."""

import logging
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from umbp_connectors import hookimpl
from umbp_connectors.config import UmbpConfig
from umbp_connectors.hookspecs import ClientSpec, DramTierSpec, SsdTierSpec
from umbp_connectors.plugins import PluginHost, create_manager
from umbp_core.errors import ConfigError, TierUnavailable
from umbp_core.eviction import LruPolicy, PrefixAwareLruPolicy
from umbp_core.ids import Identity, RankScope
from umbp_core.scheduler import Limits, TransferScheduler
from umbp_core.tiers import Tier


def plugin(**hooks: Callable[..., Any]) -> SimpleNamespace:
    """A plug-in object with these hook functions."""
    return SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})


@pytest.fixture
def host() -> PluginHost:
    return create_manager(UmbpConfig(), entries=[])


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "umbp")


def test_built_in_parts_come_through_the_same_door(host: PluginHost) -> None:
    assert host.names == ["builtin"]
    assert isinstance(host.make_eviction("lru"), LruPolicy)
    assert isinstance(host.make_eviction("prefix_aware_lru"), PrefixAwareLruPolicy)
    assert isinstance(host.make_scheduler(Limits()), TransferScheduler)


def test_built_in_dram_tier_is_open_memory(host: PluginHost) -> None:
    tier = host.make_dram_tier(DramTierSpec(page_bytes=4096, pages=3, staging_pages=1))
    try:
        tier.page(2)[:5] = b"hello"
        assert bytes(tier.array[2, :5]) == b"hello"
        assert (tier.pages, tier.staging_pages, tier.page_bytes) == (3, 1, 4096)
    finally:
        tier.close()


def test_built_in_ssd_tier_is_open_slots(tmp_path: Any) -> None:
    config = UmbpConfig(ssd_dir=tmp_path, ssd_capacity=8 << 20)
    tier = create_manager(config, entries=[]).make_ssd_tier(SsdTierSpec("model", bytes(32), slot_bytes=4096))
    try:
        assert tier.slots > 0
        tier.slab.write_from(0, memoryview(bytearray(b"x" * 4096)))
        back = bytearray(4096)
        tier.slab.read_into(0, memoryview(back))
        assert back == b"x" * 4096
    finally:
        tier.close()


def test_built_in_client_puts_gets_and_finds(tmp_path: Any) -> None:
    config = UmbpConfig(dram_capacity=1 << 20, ssd_dir=tmp_path, ssd_capacity=16 << 20)
    identity = Identity("model", bytes(32), RankScope())
    client = create_manager(config, entries=[]).make_client(ClientSpec(identity, object_bytes=1000))
    try:
        client.put([b"a"], [b"x" * 1000])
        back = bytearray(1000)
        client.get([b"a"], [back])
        assert back == b"x" * 1000
        assert client.exists([b"a", b"b"]) == [True, False]
    finally:
        client.close()


def test_a_pool_evicts_by_the_policy_of_a_plug_in() -> None:
    """The newest goes first, which no built-in policy does."""

    class NewestFirst(LruPolicy):
        def victims(self) -> Iterator[bytes]:
            return reversed(list(super().victims()))

    def umbp_make_eviction(name: str) -> LruPolicy | None:
        return NewestFirst() if name == "newest" else None

    config = UmbpConfig(dram_capacity=3 * 4096, eviction_policy="newest", dram_prefault=False)
    host = create_manager(config, entries=[])
    host.register(plugin(umbp_make_eviction=umbp_make_eviction), "mine")
    client = host.make_client(ClientSpec(Identity("model", bytes(32), RankScope()), object_bytes=4096))
    try:
        keys = [b"a", b"b", b"c", b"d"]
        for key in keys:
            client.put([key], [key * 4096])
        assert client.exists(keys) == [True, True, False, True]
    finally:
        client.close()


def test_ssd_tier_without_a_folder_says_what_to_set(host: PluginHost) -> None:
    with pytest.raises(ConfigError, match="set ssd_dir"):
        host.make_ssd_tier(SsdTierSpec("model", bytes(32), slot_bytes=4096))


def test_unknown_eviction_policy_names_the_known_ones(host: PluginHost) -> None:
    with pytest.raises(ConfigError, match=r"'lruu'.*lru, prefix_aware_lru"):
        host.make_eviction("lruu")
    with pytest.raises(ConfigError, match=r"'lruu'.*lru, prefix_aware_lru"):
        create_manager(UmbpConfig(eviction_policy="lruu"), entries=[]).eviction_maker()


def test_others_are_asked_before_the_built_in_parts_last_registered_first(host: PluginHost) -> None:
    asked = []

    def answering(name: str) -> Callable[..., Any]:
        def umbp_make_eviction() -> LruPolicy | None:
            asked.append(name)
            return LruPolicy() if name == "first" else None

        return umbp_make_eviction

    host.register(plugin(umbp_make_eviction=answering("first")), "first")
    host.register(plugin(umbp_make_eviction=answering("second")), "second")
    assert type(host.make_eviction("prefix_aware_lru")) is LruPolicy
    assert asked == ["second", "first"]


def test_maker_that_raises_is_passed_over(host: PluginHost, caplog: pytest.LogCaptureFixture) -> None:
    def umbp_make_eviction(name: str) -> None:
        raise RuntimeError(f"no {name}")

    host.register(plugin(umbp_make_eviction=umbp_make_eviction), "broken")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert isinstance(host.make_eviction("lru"), LruPolicy)
    assert host.failures == {("broken", "umbp_make_eviction"): 3}
    assert len([record for record in caplog.records if "broken" in record.getMessage()]) == 1


def test_maker_may_say_that_the_part_cannot_be_had(host: PluginHost) -> None:
    def umbp_make_tier() -> None:
        raise TierUnavailable("the disk is gone; plug it in")

    host.register(plugin(umbp_make_tier=umbp_make_tier), "honest")
    with pytest.raises(TierUnavailable, match="plug it in"):
        host.make_dram_tier(DramTierSpec(4096, 1))
    assert host.failures == {}


def test_observers_hear_what_they_ask_for(host: PluginHost) -> None:
    heard: list[tuple[Any, ...]] = []

    def umbp_op_finished(direction: str, nbytes: int) -> None:
        heard.append((direction, nbytes))

    def umbp_blocks_reported(tier: Tier, keys: list[bytes]) -> None:
        heard.append(("reported", tier, list(keys)))

    def umbp_blocks_revoked(keys: list[bytes]) -> None:
        heard.append(("revoked", list(keys)))

    def umbp_degraded(what: str, reason: str) -> None:
        heard.append((what, reason))

    functions = (umbp_op_finished, umbp_blocks_reported, umbp_blocks_revoked, umbp_degraded)
    host.register(plugin(**{function.__name__: function for function in functions}), "ear")
    host.op_finished("load", "done", 4096, 0.5, "")
    host.blocks_changed([b"a"], [b"b"], Tier.SSD)
    host.blocks_changed([], [], Tier.DRAM)
    host.degraded("ssd", "disk full")
    assert heard == [("load", 4096), ("revoked", [b"b"]), ("reported", Tier.SSD, [b"a"]), ("ssd", "disk full")]


def test_observer_that_raises_silences_nobody_else(host: PluginHost, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    raising = plugin(umbp_degraded=lambda what: 1 / 0)
    host.register(plugin(umbp_degraded=lambda what: heard.append(what)), "below")
    host.register(raising, "raising")
    host.register(plugin(umbp_degraded=lambda what: heard.append(what)), "above")
    with caplog.at_level(logging.WARNING):
        host.degraded("ssd", "x")
        host.degraded("dram", "x")
    assert heard == ["ssd", "ssd", "dram", "dram"]
    assert host.failures == {("raising", "umbp_degraded"): 2}
    assert caplog.text.count("'raising'") == 1


def test_observers_may_be_told_by_many_threads(host: PluginHost) -> None:
    host.register(plugin(umbp_degraded=lambda what: 1 / 0), "raising")
    start = threading.Barrier(4)

    def tell() -> None:
        start.wait(60)
        for _ in range(200):
            host.degraded("x", "y")

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert host.failures == {("raising", "umbp_degraded"): 800}


@pytest.mark.parametrize(
    "bad",
    [
        plugin(umbp_no_such_hook=lambda: None),
        plugin(umbp_degraded=lambda what, colour: None),
        SimpleNamespace(umbp_degraded=hookimpl(wrapper=True)(lambda: (yield))),
    ],
    ids=["no such hook", "no such argument", "wrapper"],
)
def test_plugin_that_does_not_fit_is_refused_and_leaves_no_trace(host: PluginHost, bad: object) -> None:
    with pytest.raises(pluggy.PluginValidationError):
        host.register(bad, "bad")
    assert host.names == ["builtin"]
    host.degraded("x", "y")
    assert host.failures == {}


def test_entry_points_load_and_what_cannot_be_loaded_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    entries = [entry("gone", "no_such_module_anywhere"), entry("fine", "json"), entry("odd", "json:no_such_name")]
    with caplog.at_level(logging.WARNING):
        host = create_manager(UmbpConfig(), entries)
    assert host.names == ["builtin", "fine"]
    assert set(host.failures) == {("gone", "load"), ("odd", "load")}
    assert "no_such_module_anywhere" in caplog.text


def test_allow_list_restricts_what_loads() -> None:
    entries = [entry("one", "json"), entry("two", "string")]
    assert create_manager(UmbpConfig(plugins=("two",)), entries).names == ["builtin", "two"]
    assert create_manager(UmbpConfig(plugins=()), entries).names == ["builtin", "one", "two"]


def test_allow_list_with_a_name_that_is_not_installed_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        host = create_manager(UmbpConfig(plugins=("won",)), [entry("one", "json")])
    assert host.names == ["builtin"]
    assert "did you mean 'one'?" in caplog.text


def test_the_same_name_twice_is_one_plugin() -> None:
    assert create_manager(UmbpConfig(), [entry("one", "json"), entry("one", "json")]).names == ["builtin", "one"]


def test_installed_entry_points_are_the_default() -> None:
    assert "builtin" in create_manager(UmbpConfig()).names
