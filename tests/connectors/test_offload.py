"""The gate before a tier: which policies the configuration asks for, whose plug-ins they are, what they refuse."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from umbp_connectors import hookimpl
from umbp_connectors.config import UmbpConfig
from umbp_connectors.hookspecs import OffloadSpec
from umbp_connectors.offload import OffloadGate
from umbp_connectors.plugins import PluginHost, create_manager
from umbp_core.errors import ConfigError
from umbp_core.offload import OffloadPolicy, OffloadRun
from umbp_core.tiers import Tier

A, B, C = b"a", b"b", b"c"


class Edge:
    """A gate before SSD that holds ``there``, and what it refused."""

    def __init__(self, *names: str, there: Sequence[bytes] = (), **config: Any) -> None:
        self.now = 0.0
        self.refused: Counter[str] = Counter()
        self.host = create_manager(UmbpConfig(ssd_offload_policy=names, **config), entries=[])
        self._there = there

    def open(self) -> OffloadGate | None:
        """The gate; ``None`` when nothing has to be asked."""
        spec = OffloadSpec(Tier.DRAM, Tier.SSD, lambda keys: [key in self._there for key in keys])
        return self.host.make_offload_gate(spec, lambda: self.now, self._refuse)

    def _refuse(self, name: str, blocks: int) -> None:
        self.refused[name] += blocks


def plugin(policy: OffloadPolicy, name: str = "mine") -> SimpleNamespace:
    """A plug-in that offers ``policy`` under ``name``."""

    def umbp_make_offload_policy(name: str) -> OffloadPolicy | None:
        return policy if name == mine else None

    mine = name
    return SimpleNamespace(umbp_make_offload_policy=hookimpl(umbp_make_offload_policy))


def opened(edge: Edge) -> OffloadGate:
    gate = edge.open()
    assert gate is not None
    return gate


@pytest.mark.parametrize("names", [(), ("presence",)])
def test_with_presence_alone_nothing_is_asked(names: tuple[str, ...]) -> None:
    assert Edge(*names).open() is None


def test_presence_is_the_default_of_both_edges() -> None:
    config = UmbpConfig()
    assert (config.dram_offload_policy, config.ssd_offload_policy) == (("presence",), ("presence",))


@pytest.mark.statement("connector", 75)
@pytest.mark.statement("connector", 76)
def test_the_configured_policies_have_to_agree() -> None:
    edge = Edge("presence", "priority", "frequency", there=[C], offload_min_priority=50)
    gate = opened(edge)
    assert list(gate.admit([A, B, C], [80, 20, 20])) == [False, False, False]
    assert list(gate.admit([A, B, C], [80, 20, 20])) == [True, False, False]
    assert edge.refused == {"presence": 2, "priority": 2, "frequency": 1}


@pytest.mark.statement("connector", 73)
def test_the_window_and_the_sightings_are_configured() -> None:
    edge = Edge("frequency", offload_min_sightings=3, offload_window_s=10.0)
    gate = opened(edge)
    edge.now = 5.0
    assert [gate.admit([A])[0] for _ in range(3)] == [False, False, True]
    edge.now = 60.0
    assert not gate.admit([A])[0]


@pytest.mark.statement("connector", 73)
def test_the_filter_can_be_switched_off() -> None:
    assert list(opened(Edge("all")).admit([A, B])) == [True, True]
    assert list(opened(Edge("frequency", offload_min_sightings=1)).admit([A, B])) == [True, True]


def test_each_edge_has_counts_of_its_own() -> None:
    edge = Edge("frequency")
    first, second = opened(edge), opened(edge)
    assert list(first.admit([A])) == [False]
    assert list(second.admit([A])) == [False]


@pytest.mark.statement("connector", 76)
def test_a_plugin_offers_a_policy_and_may_replace_a_built_in_one() -> None:
    class OnlyA:
        def admit(self, run: OffloadRun, now: float) -> list[bool]:
            return [key == A for key in run.keys]

    edge = Edge("mine")
    edge.host.register(plugin(OnlyA()), "other")
    assert list(opened(edge).admit([A, B])) == [True, False]
    assert edge.refused == {"mine": 1}
    edge = Edge("presence")
    edge.host.register(plugin(OnlyA(), "presence"), "other")
    assert list(opened(edge).admit([A, B])) == [True, False]


def test_a_policy_that_fails_admits_everything_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def admit(self, run: OffloadRun, now: float) -> list[bool]:
            return [] if len(run.keys) == 1 else [1 / 0 > 1]

    edge = Edge("mine", "frequency")
    edge.host.register(plugin(Broken()), "other")
    gate = opened(edge)
    with caplog.at_level(logging.WARNING):
        assert list(gate.admit([A, B])) == [False, False]
        assert list(gate.admit([A])) == [True]
    assert edge.refused == {"frequency": 2}
    assert edge.host.failures == {("offload policy mine", "admit"): 2}
    assert caplog.text.count("'offload policy mine'") == 1


def _host(**config: Any) -> PluginHost:
    return create_manager(UmbpConfig(**config), entries=[])


@pytest.mark.parametrize("key", ["dram_offload_policy", "ssd_offload_policy"])
def test_a_name_that_nobody_offers_stops_the_start(key: str) -> None:
    _host(**{key: "presence, frequency,priority,all"}).check_offload_policies()
    with pytest.raises(ConfigError, match=r"'often' \(built in: all, presence, frequency, priority\)"):
        _host(**{key: "often"}).check_offload_policies()
