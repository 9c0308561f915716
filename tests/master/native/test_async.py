"""The asyncio client: many requests under way on one connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.master.native.harness import DEADLINE, DRAM, FakeMaster, Master, RawServerEnd, hashes_of
from umbp_connectors.client.native_async import NativeAsyncClient
from umbp_connectors.client.native_session import Identity
from umbp_core.errors import AccessDenied, InvalidRequest, MasterError, MasterUnavailable, ProtocolError
from umbp_core.master.model import Registration
from umbp_core.wire.codes import ErrorCode
from umbp_core.wire.frames import FrameType

FOUND = 116
SHORT = 0.05


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, DEADLINE))


async def outcomes(*calls: Awaitable[object]) -> list[object]:
    """What calls that are made at once return or raise."""
    return await asyncio.gather(*calls, return_exceptions=True)


def test_a_thousand_requests_at_once_find_their_answers(path: str) -> None:
    async def work() -> None:
        client = NativeAsyncClient(path, pending=64)
        await client.register(Registration("n"), DEADLINE)
        hashes = hashes_of(*range(1000))
        await client.report("n", hashes, DRAM, DEADLINE)
        answers = await asyncio.gather(*[client.match([one], False, DEADLINE) for one in hashes])
        assert [answer[0].tiers for answer in answers] == [{DRAM: [one]} for one in hashes]
        client.close()

    run(work())


def test_requests_take_effect_in_their_order(path: str) -> None:
    """Whatever their size: what changes a lot is not overtaken by what asks for it."""

    async def work() -> None:
        client = NativeAsyncClient(path)
        await client.register(Registration("n"), DEADLINE)
        hashes = hashes_of(*range(40_000))
        done = await asyncio.gather(
            client.match(hashes[-1:], False, DEADLINE),
            client.report("n", hashes, DRAM, DEADLINE),
            client.match(hashes[-1:], False, DEADLINE),
            client.revoke("n", hashes, DRAM, DEADLINE),
            client.match(hashes[-1:], False, DEADLINE),
            client.report("n", hashes[-1:], DRAM, DEADLINE),
            client.clear_node("n", DEADLINE),
            client.match(hashes[-1:], False, DEADLINE),
        )
        assert [bool(answer) for answer in done] == [False, True, True, False, False, True, False, False]
        client.close()

    run(work())


def test_many_large_answers_do_not_pile_up_in_the_master(path: str, running: Master) -> None:
    """A client that asks without reading is left waiting, and so is nobody else."""

    async def work() -> None:
        client = NativeAsyncClient(path)
        await client.register(Registration("n"), DEADLINE)
        hashes = hashes_of(*range(10**18, 10**18 + 4000))
        await client.report("n", hashes, DRAM, DEADLINE)
        pages = await asyncio.gather(*[client.list_blocks("n", DRAM, 0, 4000, DEADLINE) for _ in range(400)])
        assert {len(page.hashes) for page in pages} == {4000}
        client.close()

    run(work())


def test_one_call_that_is_late_is_given_up_alone(tmp_path: Path) -> None:
    def answers_out_of_order(end: RawServerEnd) -> None:
        end.welcome()
        first, second, third = (end.receive()[1] for _ in range(3))
        end.send(FrameType.REPLY, third, [FOUND, b"\1"])
        end.send(FrameType.REPLY, second, [FOUND, b"\0"])
        _, fourth, _ = end.receive()
        end.send(FrameType.REPLY, first, [FOUND, b"\1"])  # late: nobody waits for it
        end.send(FrameType.REPLY, fourth, [FOUND, b"\1"])
        end.until_closed()

    async def work(address: str) -> None:
        client = NativeAsyncClient(address)
        await client.open(DEADLINE)
        late, second, third = await outcomes(
            client.lookup([b"k"], SHORT), client.lookup([b"k"], DEADLINE), client.lookup([b"k"], DEADLINE)
        )
        assert isinstance(late, MasterUnavailable)
        assert (second, third) == ([False], [True])
        assert await client.lookup([b"k"], DEADLINE) == [True]
        client.close()

    with FakeMaster(tmp_path / "s", answers_out_of_order) as fake:
        run(work(fake.address))


def test_a_caller_that_is_cancelled_disturbs_nobody(tmp_path: Path) -> None:
    def script(end: RawServerEnd) -> None:
        end.welcome()
        first, second = (end.receive()[1] for _ in range(2))
        end.send(FrameType.REPLY, first, [FOUND, b"\1"])
        end.send(FrameType.REPLY, second, [FOUND, b"\1"])
        end.until_closed()

    async def work(address: str) -> None:
        client = NativeAsyncClient(address)
        await client.open(DEADLINE)
        first = asyncio.ensure_future(client.lookup([b"k"], DEADLINE))
        await asyncio.sleep(0)
        first.cancel()
        assert await client.lookup([b"k"], DEADLINE) == [True]
        assert first.cancelled()
        client.close()

    with FakeMaster(tmp_path / "s", script) as fake:
        run(work(fake.address))


def test_a_broken_connection_fails_everybody_and_is_made_anew(tmp_path: Path) -> None:
    def breaks(end: RawServerEnd) -> None:
        end.welcome()
        for _ in range(3):
            end.receive()

    def answers(end: RawServerEnd) -> None:
        end.welcome()
        _, sequence, _ = end.receive()
        end.send(FrameType.REPLY, sequence, [FOUND, b"\1"])
        end.until_closed()

    async def work(address: str) -> None:
        client = NativeAsyncClient(address)
        failed = await outcomes(*[client.lookup([b"k"], DEADLINE) for _ in range(3)])
        assert [type(failure) for failure in failed] == [MasterUnavailable] * 3
        assert await client.lookup([b"k"], DEADLINE) == [True]
        client.close()

    with FakeMaster(tmp_path / "s", breaks, answers) as fake:
        run(work(fake.address))


def reply_to_nobody(end: RawServerEnd) -> None:
    end.send(FrameType.REPLY, 99, [FOUND, b"\1"])


def garbage(end: RawServerEnd) -> None:
    end.socket.sendall(bytes(100))


def stops(end: RawServerEnd) -> None:
    end.send(FrameType.ERROR, 0, [3, ErrorCode.UNAVAILABLE, "the master stops"])


@pytest.mark.parametrize(
    ("wrong", "kind"), [(reply_to_nobody, ProtocolError), (garbage, ProtocolError), (stops, MasterUnavailable)]
)
def test_what_is_not_understood_ends_the_connection(
    tmp_path: Path, wrong: Callable[[RawServerEnd], None], kind: type[MasterError]
) -> None:
    def script(end: RawServerEnd) -> None:
        end.welcome()
        end.receive()
        wrong(end)
        end.until_closed()

    async def work(address: str) -> None:
        client = NativeAsyncClient(address)
        with pytest.raises(kind):
            await client.lookup([b"k"], DEADLINE)
        client.close()

    with FakeMaster(tmp_path / "s", script) as fake:
        run(work(fake.address))


def test_requests_wait_for_room_until_their_time_is_up(tmp_path: Path) -> None:
    def silent(end: RawServerEnd) -> None:
        end.welcome()
        end.until_closed()

    async def work(address: str) -> None:
        loop, ahead = asyncio.get_running_loop(), 0.0
        clock = loop.time
        loop.time = lambda: clock() + ahead  # type: ignore[method-assign]
        client = NativeAsyncClient(address, pending=2)
        await client.open(DEADLINE)
        stays = asyncio.ensure_future(client.lookup([b"k"], DEADLINE))
        goes = asyncio.ensure_future(client.lookup([b"k"], DEADLINE / 2))
        await asyncio.sleep(0)
        with pytest.raises(MasterUnavailable, match="no answer in time"):
            await client.lookup([b"k"], SHORT)
        assert not goes.done()
        gets_its_room = asyncio.ensure_future(client.lookup([b"k"], DEADLINE))
        waits = asyncio.ensure_future(client.lookup([b"k"], DEADLINE))
        ahead = DEADLINE / 2
        with pytest.raises(MasterUnavailable, match="no answer in time"):
            await goes
        client.close()
        for call in (stays, gets_its_room, waits):
            with pytest.raises(MasterUnavailable):
                await call

    with FakeMaster(tmp_path / "s", silent) as fake:
        run(work(fake.address))


def test_who_waits_for_room_no_more_takes_nobodys_turn(tmp_path: Path) -> None:
    """One is late, one is cancelled, one asks for too much: the room that there is belongs to the next in line."""
    answer = threading.Event()

    def script(end: RawServerEnd) -> None:
        end.welcome()
        _, first, _ = end.receive()
        assert answer.wait(DEADLINE)
        end.send(FrameType.REPLY, first, [FOUND, b"\1"])
        _, last, _ = end.receive()
        end.send(FrameType.REPLY, last, [FOUND, b"\0"])
        end.until_closed()

    async def work(address: str) -> None:
        client = NativeAsyncClient(address, pending=1)
        await client.open(DEADLINE)
        first, late, cancelled, refused, last = [
            asyncio.ensure_future(client.lookup(keys, timeout))
            for keys, timeout in [
                ([b"k"], DEADLINE),
                ([b"k"], SHORT),
                ([b"k"], DEADLINE),
                ([bytes(60_000)] * 300, DEADLINE),
                ([b"k"], DEADLINE),
            ]
        ]
        with pytest.raises(MasterUnavailable, match="no answer in time"):
            await late
        cancelled.cancel()
        answer.set()
        assert await first == [True]
        with pytest.raises(InvalidRequest, match="split it"):
            await refused
        assert await last == [False]
        client.close()

    with FakeMaster(tmp_path / "s", script) as fake:
        run(work(fake.address))


def test_nobody_is_there_and_nobody_greets(tmp_path: Path) -> None:
    """Of who does not greet, the system has taken the connection."""

    async def work(address: str, timeout: float) -> None:
        client = NativeAsyncClient(address)
        failed = await outcomes(*[client.lookup([b"k"], timeout) for _ in range(3)])
        assert [type(failure) for failure in failed] == [MasterUnavailable] * 3
        client.close()
        with pytest.raises(MasterUnavailable, match="closed"):
            await client.lookup([b"k"], timeout)

    run(work(str(tmp_path / "nothing"), DEADLINE))
    with FakeMaster(tmp_path / "s") as fake:
        run(work(fake.address, SHORT))


def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    def silent(end: RawServerEnd) -> None:
        end.welcome()
        end.until_closed()

    def deaf(end: RawServerEnd) -> None:
        end.until_closed()

    async def work(address: str, wait_for_greeting: bool) -> None:
        client = NativeAsyncClient(address)
        if wait_for_greeting:
            await client.open(DEADLINE)
        call = asyncio.ensure_future(client.lookup([b"k"], DEADLINE))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        client.close()
        with pytest.raises(MasterUnavailable):
            await call

    with FakeMaster(tmp_path / "s", silent, deaf) as fake:
        run(work(fake.address, True))
        run(work(fake.address, False))


def test_the_token_and_the_bounds(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "locked"
    running.serve(path, token=b"secret")

    async def work() -> None:
        with pytest.raises(AccessDenied):
            await NativeAsyncClient(str(path)).open(DEADLINE)
        client = NativeAsyncClient(str(path), Identity(token=b"secret"))
        with pytest.raises(InvalidRequest, match="split it"):
            await client.report("n", [bytes(60_000)] * 300, DRAM, DEADLINE)
        assert await client.list_nodes(DEADLINE) == []
        client.close()

    run(work())
