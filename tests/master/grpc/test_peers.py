"""Asking nodes to evict: what is sent, to whom, and that nobody's silence is our problem."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from tests.master.grpc.harness import DEADLINE
from umbp_connectors.master import peers
from umbp_connectors.master.peers import EVICT_KEY, PeerEvictions
from umbp_connectors.wire_grpc import messages as pb
from umbp_core.master.model import EvictionOrder

Answer = Callable[[list[bytes]], Awaitable[bytes]]


class Peer:
    """A node's ``UMBPPeer``."""

    def __init__(self, answer: Answer | None = None, address: str = "127.0.0.1:0") -> None:
        self.asked: list[list[bytes]] = []
        self._answer = answer or self._evict
        self._server = grpc.aio.server()
        handlers = {"EvictKey": grpc.unary_unary_rpc_method_handler(self._serve)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(pb.PEER_SERVICE, handlers),))
        port = self._server.add_insecure_port(address)
        self.address = address.replace(":0", f":{port}")

    async def __aenter__(self) -> "Peer":
        await self._server.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._server.stop(0)

    def order(self, *keys: bytes) -> EvictionOrder:
        return EvictionOrder("n1", self.address, keys, 10 * len(keys))

    async def _serve(self, data: bytes, _context: object) -> bytes:
        keys = list(pb.EvictKeyRequest.FromString(data).keys)
        self.asked.append(keys)
        return await self._answer(keys)

    async def _evict(self, keys: list[bytes]) -> bytes:
        evicted = [{"key": key, "bytes_freed": 10} for key in keys]
        data: bytes = pb.EvictKeyResponse(evicted=evicted).SerializeToString()
        return data


def test_a_node_is_asked_for_its_blocks() -> None:
    async def scenario() -> list[list[bytes]]:
        evictions = PeerEvictions(deadline=DEADLINE)
        async with Peer() as peer:
            await evictions.send(peer.order(b"a", b"b"))
            await evictions.send(peer.order(b"c"))
            await evictions.send(peer.order())
            await evictions.close()
            return peer.asked

    assert asyncio.run(scenario()) == [[b"a", b"b"], [b"c"]]
    assert EVICT_KEY == "/umbp.UMBPPeer/EvictKey"


def test_many_keys_are_asked_for_in_calls_that_a_peer_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_KEY_BYTES", 10)
    keys = (b"x" * 6, b"y" * 4, b"z", b"l" * 30, b"m")

    async def scenario() -> list[list[bytes]]:
        evictions = PeerEvictions(deadline=DEADLINE)
        async with Peer() as peer:
            await evictions.send(peer.order(*keys))
            await evictions.close()
            return peer.asked

    assert asyncio.run(scenario()) == [list(keys[:2]), [keys[2]], [keys[3]], [keys[4]]]


def test_a_node_without_an_address_or_an_answer_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def nonsense(_keys: list[bytes]) -> bytes:
        return b"\xff"

    async def scenario() -> None:
        evictions = PeerEvictions(deadline=DEADLINE)
        await evictions.send(EvictionOrder("homeless", "", (b"a",), 1))
        await evictions.send(EvictionOrder("gone", "127.0.0.1:1", (b"a",), 1))
        async with Peer(nonsense) as peer:
            await evictions.send(peer.order(b"a"))
        await evictions.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "gone" in messages[0]
    assert "EvictKeyResponse" in messages[1]


def test_a_node_that_hangs_costs_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    async def hang(_keys: list[bytes]) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def scenario() -> None:
        evictions = PeerEvictions(deadline=0.1)
        async with Peer(hang) as peer:
            await asyncio.wait_for(evictions.send(peer.order(b"a")), DEADLINE)
            await evictions.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert "DEADLINE_EXCEEDED" in caplog.text


def test_calls_at_once_are_bounded() -> None:
    running = most = 0

    async def scenario() -> None:
        go_on = asyncio.Event()

        async def count(_keys: list[bytes]) -> bytes:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if running == 3:
                asyncio.get_running_loop().call_soon(go_on.set)
            await go_on.wait()
            running -= 1
            return b""

        evictions = PeerEvictions(deadline=DEADLINE, max_calls=3)
        async with Peer(count) as peer:
            await asyncio.gather(*(evictions.send(peer.order(b"%d" % number)) for number in range(12)))
            assert len(peer.asked) == 12
            await evictions.close()

    asyncio.run(scenario())
    assert most == 3


def test_connections_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_CHANNELS", 2)
    opened: list[str] = []
    connect = grpc.aio.insecure_channel

    def counted(target: str, options: object) -> grpc.aio.Channel:
        opened.append(target)
        return connect(target, options)

    async def scenario() -> list[int]:
        evictions = PeerEvictions(deadline=DEADLINE)
        async with Peer() as first, Peer() as second, Peer() as third:
            monkeypatch.setattr(grpc.aio, "insecure_channel", counted)
            for turn in (first, second, first, third, first, second):
                await evictions.send(turn.order(b"k"))
            await evictions.close()
            names = {f"dns:///{peer.address}": number for number, peer in enumerate((first, second, third), start=1)}
            assert [len(peer.asked) for peer in (first, second, third)] == [3, 2, 1]
            return [names[target] for target in opened]

    assert asyncio.run(scenario()) == [1, 2, 3, 2], "the one that was used least recently gives way"


def test_an_address_brings_no_scheme_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A node could otherwise make the master talk to a socket of the master's machine."""

    async def scenario() -> list[list[bytes]]:
        evictions = PeerEvictions(deadline=2.0)
        async with Peer(address=f"unix:{tmp_path}/service.sock") as private:
            await evictions.send(private.order(b"a"))
            await evictions.close()
            return private.asked

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(scenario()) == []
    assert "did not evict" in caplog.text
