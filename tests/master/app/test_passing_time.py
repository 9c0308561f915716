"""What a master does by itself: silent nodes expire with their series, full nodes are told to evict."""

import queue
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from time import monotonic

import grpc
import pytest

from tests.master.app.master_process import CALL, DEADLINE, MasterProcess
from umbp_connectors.wire_grpc import messages as pb
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import Heartbeat, NodeStatus, Registration, TierCapacity
from umbp_core.tiers import Tier

HASTY = {
    "UMBP_HEARTBEAT_TTL_SEC": "0.3",
    "UMBP_MAX_MISSED_HEARTBEATS": "1",
    "UMBP_REAPER_INTERVAL_SEC": "0.1",
}


def test_a_silent_node_expires_and_its_series_go(tmp_path: Path) -> None:
    with MasterProcess(tmp_path, **HASTY) as master:
        client = master.native()
        assert client.register(Registration("n1"), CALL).heartbeat_interval_ms == 150
        client.report("n1", [b"a"], Tier.HBM, CALL)
        end = monotonic() + DEADLINE
        while client.list_nodes(CALL)[0].status is NodeStatus.ALIVE:
            assert monotonic() < end
        page = master.get("/metrics")[1]
        assert 'node="n1"' not in page
        assert "mori_umbp_client_count 0.0" in page
        assert master.says("node n1 expired")
        client.close()
        assert master.end() == 0


@pytest.fixture
def peer() -> Iterator[tuple[str, "queue.Queue[list[bytes]]"]]:
    """A node of UMBP that notes what it is asked to evict."""
    asked: queue.Queue[list[bytes]] = queue.Queue()

    def evict(request: bytes, _context: grpc.ServicerContext) -> bytes:
        keys = list(pb.EvictKeyRequest.FromString(request).keys)
        asked.put([key if isinstance(key, bytes) else key.encode() for key in keys])
        return bytes(pb.EvictKeyResponse().SerializeToString())

    server = grpc.server(futures.ThreadPoolExecutor(1))
    handlers = {"EvictKey": grpc.unary_unary_rpc_method_handler(evict)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("umbp.UMBPPeer", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", asked
    server.stop(None).wait(DEADLINE)


def test_a_full_node_is_told_to_evict_the_oldest(tmp_path: Path, peer: tuple[str, "queue.Queue[list[bytes]]"]) -> None:
    address, asked = peer
    with MasterProcess(tmp_path, UMBP_EVICTION_CHECK_INTERVAL_SEC="0.1") as master:
        client = master.grpc()
        full = (TierCapacity(Tier.DRAM, 100, 0),)
        client.register(Registration("n1", peer_address=address, capacities=full), CALL)
        old = Bundle(1, tuple(Delta(b"old-%d" % number, Tier.DRAM, 10) for number in range(3)))
        new = Bundle(2, tuple(Delta(b"new-%d" % number, Tier.DRAM, 10) for number in range(7)))
        for bundle in (old, new):
            client.heartbeat(Heartbeat("n1", [bundle], capacities=full), CALL)
        keys = asked.get(timeout=DEADLINE)
        assert set(keys) == {b"old-0", b"old-1", b"old-2"}
        client.close()
        assert master.end() == 0
