"""A master that comes back with its table of nodes and nothing of what they told, at the worst moments."""

from __future__ import annotations

import pytest

from tests.master.client.fake_network import GRPC, NATIVE, FakeNetwork, refuse_events
from tests.master.client.reporting_node import ReportingNode
from umbp_connectors.client.addresses import MasterAddress
from umbp_core.journal import Delta

HBM, DRAM = 1, 2
INTERVAL = 5.0
BOTH = pytest.mark.parametrize("door", [NATIVE, GRPC], ids=["native", "grpc"])


def settled_node(door: MasterAddress) -> ReportingNode:
    node = ReportingNode(FakeNetwork(), addresses=[door])
    node.report([b"a", b"b"], HBM)
    node.record([Delta(b"a", DRAM, 10)])
    node.run(INTERVAL)
    assert node.told()
    return node


@BOTH
@pytest.mark.parametrize("steps", range(1, 7))
def test_two_restarts_within_a_few_steps(door: MasterAddress, steps: int) -> None:
    """The blocks that are told anew after the first hide from a plain master's answer that the second forgot, too."""
    node = settled_node(door)
    node.network.restart_master(persistent=True)
    node.report([b"c"], HBM)
    for _ in range(steps):
        node.step()
    node.network.restart_master(persistent=True)
    node.run(2 * INTERVAL)
    assert node.told()


@BOTH
def test_reports_are_told_once_after_a_restart(door: MasterAddress) -> None:
    node = settled_node(door)
    node.network.restart_master(persistent=True)
    before = node.counters.full_syncs
    node.run(2 * INTERVAL)
    assert node.told()
    assert node.counters.full_syncs == before + 1


@BOTH
def test_a_node_whose_blocks_are_refused_tells_its_reports_all_the_same(
    door: MasterAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = settled_node(door)
    refuse_events(node.network.state, monkeypatch)
    node.record([Delta(b"c", DRAM, 1)])
    node.run(INTERVAL)
    assert node.counters.refused == 1
    node.network.restart_master(persistent=True)
    refuse_events(node.network.state, monkeypatch)
    beats = node.counters.heartbeats
    node.report([b"c"], HBM)
    node.run(10 * INTERVAL)
    assert node.network.external("node") == {(HBM, b"a"), (HBM, b"b"), (HBM, b"c")}
    assert node.counters.heartbeats - beats <= 12, "not at full speed"
