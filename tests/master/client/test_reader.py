"""Those that only ask: an answer, or none, and never a node of their own."""

from __future__ import annotations

from tests.master.client.fake_network import GRPC, NATIVE, FakeNetwork
from umbp_connectors.client.reader import MasterReader
from umbp_core.index_match import TierRun
from umbp_core.master.model import Registration

A, B, C = b"a", b"b", b"c"
HBM, SSD = 1, 3


def network() -> FakeNetwork:
    """With a node that holds A on two tiers and B on the slower one."""
    made = FakeNetwork()
    transport = made.dial(NATIVE, 1.0)
    transport.register(Registration("node", tags=("http=h:1",)), 1.0)
    transport.report("node", [A], HBM, 1.0)
    transport.report("node", [A, B], SSD, 1.0)
    return made


def reader(net: FakeNetwork, *addresses: object) -> MasterReader:
    doors = addresses or (NATIVE,)
    return MasterReader(doors, dial=net.dial, clock=net.clock, chance=lambda: 0.0)  # type: ignore[arg-type]


def test_it_asks_for_prefixes_and_nodes_and_is_none_itself() -> None:
    net = network()
    asker = reader(net)
    (match,) = asker.match_prefix([A, B, C]) or []
    assert (match.node, match.length, match.runs) == ("node", 2, [TierRun(HBM, 1), TierRun(SSD, 1)])
    (weighed,) = asker.match_prefix([A, B], {SSD: 2.0}) or []
    assert weighed.cost == 4.0
    assert [info.node_id for info in asker.nodes() or []] == ["node"]
    assert len(net.registrations) == 1, "only the node itself"


def test_it_asks_for_the_best_nodes_only() -> None:
    net = network()
    asker = reader(net)
    transport = net.dial(NATIVE, 1.0)
    transport.register(Registration("longer"), 1.0)
    transport.report("longer", [A, B, C], SSD, 1.0)
    assert [match.node for match in asker.match_prefix([A, B, C], limit=1) or []] == ["longer"]
    assert [match.node for match in asker.match_prefix([A, B, C]) or []] == ["longer", "node"]


def test_no_answer_is_not_an_empty_one() -> None:
    net = network()
    asker = reader(net)
    assert asker.match_prefix([C]) == []
    net.partitioned = True
    assert asker.match_prefix([C]) is None
    assert asker.nodes() is None


def test_a_question_takes_its_deadline_and_then_none_for_a_while() -> None:
    net = network()
    net.partitioned = True
    asker = reader(net)
    begin = net.clock.now
    assert asker.match_prefix([A], timeout=0.5) is None
    assert net.clock.now - begin == 0.5
    dials = net.dials
    assert asker.match_prefix([A], timeout=0.5) is None
    assert (net.dials, net.clock.now - begin) == (dials, 0.5), "nothing is tried at once again"
    net.partitioned = False
    net.clock.now += 5.0
    assert asker.match_prefix([A]) is not None


def test_the_next_address_is_asked_when_one_does_not_answer() -> None:
    net = network()
    net.native_door = False
    asker = reader(net, NATIVE, GRPC)
    (match,) = asker.match_prefix([A, B]) or []
    assert match.length == 2
    assert asker.nodes() is None, "UMBP's gRPC cannot say"


def test_after_closing_nothing_is_asked() -> None:
    net = network()
    asker = reader(net)
    asker.close()
    asker.close()
    assert asker.match_prefix([A]) is None
