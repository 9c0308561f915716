"""Following the index over a socket: resumed by cursor, told what was missed, at the reader's pace (law L11)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.master.native.harness import DEADLINE, DRAM, HBM, INCARNATION, FakeMaster, Master, RawClient, RawServerEnd
from umbp_connectors.client.native_async import NativeAsyncClient
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_connectors.master.native_limits import NativeLimits
from umbp_connectors.master.native_watch import EVENT_BYTES
from umbp_core.errors import MasterUnavailable, ProtocolError
from umbp_core.index_feed import ChangeFeed, ChangeKind, FeedPage
from umbp_core.master.model import Registration
from umbp_core.wire.codec import decode_as
from umbp_core.wire.codes import ErrorCode
from umbp_core.wire.frames import FrameType, encode_frame
from umbp_core.wire.replies import Changes
from umbp_core.wire.values_index import changes_of

WATCH, DONE, CHANGES = 36, 4, 136
Placed = dict[tuple[str, int], set[bytes]]


async def after(pages: AsyncGenerator[FeedPage, None], cursor: int) -> list[FeedPage]:
    """The pages until ``cursor``."""
    found = []
    async with contextlib.aclosing(pages):
        async for page in pages:
            found.append(page)
            if page.cursor >= cursor:
                break
    return found


def watched(path: str, incarnation: int, cursor: int, until: int) -> list[FeedPage]:
    """What a watch says, until a cursor."""

    async def watch() -> list[FeedPage]:
        pages = NativeAsyncClient(path).watch(incarnation, cursor, timeout=DEADLINE)
        return await asyncio.wait_for(after(pages, until), DEADLINE)

    return asyncio.run(watch())


def kinds_of(pages: list[FeedPage]) -> list[tuple[int, ChangeKind, int, tuple[bytes, ...]]]:
    return [(change.seq, change.kind, change.tier, change.hashes) for page in pages for change in page.changes]


@pytest.mark.statement("connector", 91)
def test_changes_come_in_order_and_are_resumed(path: str, blocking: NativeBlockingClient) -> None:
    blocking.register(Registration("n"), DEADLINE)
    blocking.report("n", [b"1", b"2"], DRAM, DEADLINE)
    blocking.report("n", [b"1"], HBM, DEADLINE)
    blocking.revoke("n", [b"2"], DRAM, DEADLINE)
    blocking.clear_tier("n", DRAM, DEADLINE)
    everything = [
        (1, ChangeKind.REPORTED, DRAM, (b"1", b"2")),
        (2, ChangeKind.REPORTED, HBM, (b"1",)),
        (3, ChangeKind.REVOKED, DRAM, (b"2",)),
        (4, ChangeKind.CLEARED, DRAM, ()),
    ]
    for cursor in range(4):
        pages = watched(path, INCARNATION, cursor, 4)
        assert kinds_of(pages) == everything[cursor:]
        assert {page.incarnation for page in pages} == {INCARNATION}
        assert not any(page.lost for page in pages)


@pytest.mark.parametrize(("incarnation", "cursor"), [(0, 0), (INCARNATION - 1, 2), (INCARNATION, 9)])
@pytest.mark.statement("connector", 91)
def test_who_missed_something_is_told_and_goes_on_from_there(
    path: str, blocking: NativeBlockingClient, incarnation: int, cursor: int
) -> None:
    blocking.register(Registration("n"), DEADLINE)
    blocking.report("n", [b"1"], DRAM, DEADLINE)
    with RawClient(path) as raw:
        raw.greet()
        number = raw.request(WATCH, incarnation, cursor)
        assert raw.receive() == (FrameType.EVENT, number, [CHANGES, INCARNATION, 1, True, []])
        blocking.report("n", [b"2"], DRAM, DEADLINE)
        kind, _, payload = raw.receive()
        assert (kind, payload[1:4]) == (FrameType.EVENT, [INCARNATION, 2, False])
        assert [row[:4] for row in payload[4]] == [[2, 1, "n", DRAM]]


def test_changes_come_as_they_happen(path: str, blocking: NativeBlockingClient, raw: RawClient) -> None:
    blocking.register(Registration("n"), DEADLINE)
    number = raw.request(WATCH, INCARNATION, 0)
    for seq in range(1, 20):
        blocking.report("n", [b"%d" % seq], DRAM, DEADLINE)
        assert raw.receive()[2][2] == seq
    raw.send(encode_frame(FrameType.CANCEL, raw.session, number))
    assert raw.receive() == (FrameType.REPLY, number, [DONE])
    blocking.report("n", [b"more"], DRAM, DEADLINE)
    assert raw.ask(34)[0] == FrameType.REPLY


def test_a_connection_has_one_watch_and_other_requests_beside_it(raw: RawClient) -> None:
    first = raw.request(WATCH, INCARNATION, 0)
    second = raw.request(WATCH, INCARNATION, 0)
    kind, sequence, payload = raw.receive()
    assert (kind, sequence, payload[1]) == (FrameType.ERROR, second, ErrorCode.INVALID_REQUEST)
    assert raw.ask(34)[0] == FrameType.REPLY
    raw.send(encode_frame(FrameType.CANCEL, raw.session, second))
    raw.send(encode_frame(FrameType.CANCEL, raw.session, first))
    assert raw.receive() == (FrameType.REPLY, first, [DONE])
    third = raw.request(WATCH, INCARNATION, 0)
    raw.send(encode_frame(FrameType.CANCEL, raw.session, third))
    assert raw.receive() == (FrameType.REPLY, third, [DONE])


def test_silence_is_broken_now_and_then(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "chatty"
    running.serve(path, limits=NativeLimits(watch_interval=0.02))
    with RawClient(str(path)) as raw:
        raw.greet()
        number = raw.request(WATCH, INCARNATION, 0)
        for _ in range(3):
            assert raw.receive() == (FrameType.EVENT, number, [CHANGES, INCARNATION, 0, False, []])


def told(raw: RawClient, until: int) -> list[tuple[int, FeedPage]]:
    """Bytes of payload and content of the events, until a cursor."""
    found: list[tuple[int, FeedPage]] = []
    while not found or found[-1][1].cursor < until:
        payload = raw.receive_bytes()[40:]
        found.append((len(payload), changes_of(decode_as(Changes, payload))))
    return found


@pytest.mark.statement("connector", 91)
def test_a_client_that_takes_little_is_told_everything_in_small_events(
    path: str, blocking: NativeBlockingClient
) -> None:
    """Where it is told a cursor, it was told all that is before."""
    bound = 300
    blocking.register(Registration("n"), DEADLINE)
    hashes = [b"%020d" % number for number in range(100)]
    blocking.report("n", hashes, DRAM, DEADLINE)
    for one in hashes[:20]:
        blocking.report("n", [one], HBM, DEADLINE)
    blocking.revoke("n", hashes[10:60], DRAM, DEADLINE)
    blocking.clear_tier("n", HBM, DEADLINE)
    with RawClient(path) as raw:
        raw.greet()
        raw.request(WATCH, INCARNATION, 0)
        whole = {change.seq: change for _, page in told(raw, 23) for change in page.changes}
    assert len(whole) == 23
    cursors = {0}
    while cursors:
        start = cursors.pop()
        heard: dict[int, tuple[bytes, ...]] = {}
        with RawClient(path) as raw:
            raw.greet(max_frame=bound)
            raw.request(WATCH, INCARNATION, start)
            for size, page in told(raw, 23):
                assert size <= bound
                assert not page.lost
                for change in page.changes:
                    heard[change.seq] = heard.get(change.seq, ()) + change.hashes
                assert all(heard[seq] == whole[seq].hashes for seq in range(start + 1, page.cursor + 1))
                if not start and page.cursor < 23:
                    cursors.add(page.cursor)
        assert list(heard) == list(range(start + 1, 24))
        cursors.discard(0)


def test_a_client_that_does_not_take_as_much_as_one_hash_has_lost_it(
    running: Master, path: str, blocking: NativeBlockingClient
) -> None:
    """Also in the middle of a change; what comes after it is told."""
    bound = 300
    blocking.register(Registration("n"), DEADLINE)
    with RawClient(path) as raw:
        raw.greet(max_frame=bound)
        raw.request(WATCH, INCARNATION, 0)
        for seq, hashes in enumerate([[b"0" * bound], [b"1" * 150, b"2" * 150, b"3" * bound]]):
            running.run(running.service.report("n", hashes, DRAM))
            pages = [page for _, page in told(raw, 2 * seq + 1)]
            assert [page.lost for page in pages] == [False] * (2 * seq) + [True]
            assert (pages[-1].cursor, pages[-1].changes) == (2 * seq + 1, [])
            blocking.report("n", [b"%d" % seq], HBM, DEADLINE)
            ((_, page),) = told(raw, 2 * seq + 2)
            assert kinds_of([page]) == [(2 * seq + 2, ChangeKind.REPORTED, HBM, (b"%d" % seq,))]


def test_an_event_is_not_larger_than_is_made_in_a_moment(running: Master, raw: RawClient) -> None:
    """Whatever the client takes: others would have to wait."""
    running.service.register(Registration("n"))
    changes = [[b"%01000d" % (at + number) for number in range(1500)] for at in (0, 1500, 3000)]
    for hashes in changes:
        running.run(running.service.report("n", hashes, DRAM))
    raw.request(WATCH, INCARNATION, 0)
    events = told(raw, 3)
    assert max(size for size, _ in events) <= EVENT_BYTES
    assert [one for _, page in events for change in page.changes for one in change.hashes] == list(
        chain.from_iterable(changes)
    )


def test_a_slow_reader_loses_changes_and_not_the_master_its_memory(running: Master, path: str, raw: RawClient) -> None:
    """The server keeps a cursor for a reader, not what the reader should have read."""
    running.state.feed = running.state.index.feed = ChangeFeed(INCARNATION, max_changes=64)
    running.service.register(Registration("n"))
    hashes = [b"%030d" % number for number in range(1000)]

    async def churn() -> int:
        """Megabytes of changes; returns how much waits for the reader."""
        for _ in range(400):
            await running.service.report("n", hashes, DRAM)
            await running.service.revoke("n", hashes, DRAM)
            await asyncio.sleep(0)
        [connection] = running.servers[0]._connections
        assert connection._transport is not None
        return connection._transport.get_write_buffer_size()

    raw.request(WATCH, INCARNATION, 0)
    waiting = running.run(churn())
    assert waiting < 4 << 20
    placed, lost, cursor = set(), 0, 0
    while cursor < 800:
        _, _, (_, _, cursor, was_lost, rows) = raw.receive()
        lost += was_lost
        if was_lost:
            placed.clear()
        for _, kind, _, _, _, _ in rows:
            placed = set(hashes) if kind == ChangeKind.REPORTED else set()
    assert lost >= 1
    assert placed == set()
    running.run(running.service.report("n", [b"last"], DRAM))
    assert raw.receive()[2][2] == 801


def test_a_watch_that_is_lost_is_put_right_by_listing(path: str, blocking: NativeBlockingClient) -> None:
    """What a router does: list what is there, apply what comes after; the same as the index says."""
    for node in ("a", "b"):
        blocking.register(Registration(node), DEADLINE)
        blocking.report(node, [b"%d" % number for number in range(100)], DRAM, DEADLINE)

    async def follow() -> Placed:
        client = NativeAsyncClient(path)
        placed: Placed = defaultdict(set)
        changed = 0
        async with contextlib.aclosing(client.watch(timeout=DEADLINE)) as pages:
            async for page in pages:
                if page.lost:
                    await client.report("a", [b"new"], HBM, DEADLINE)
                    await client.revoke("a", [b"1", b"2"], DRAM, DEADLINE)
                    placed = await listed(client)
                    await client.clear_tier("b", DRAM, DEADLINE)
                for change in page.changes:
                    held = placed[change.node, change.tier]
                    if change.kind is ChangeKind.REPORTED:
                        held.update(change.hashes)
                    elif change.kind is ChangeKind.REVOKED:
                        held.difference_update(change.hashes)
                    else:
                        held.clear()
                    changed += 1
                if changed == 3:
                    break
        now = await listed(client)
        client.close()
        assert {where: held for where, held in placed.items() if held} == now
        return now

    now = asyncio.run(asyncio.wait_for(follow(), DEADLINE))
    assert {where: len(held) for where, held in now.items()} == {("a", DRAM): 98, ("a", HBM): 1}


async def listed(client: NativeAsyncClient) -> Placed:
    """Everything, by listing."""
    placed: Placed = defaultdict(set)
    for info in await client.list_nodes(DEADLINE):
        for tier in info.external_counts:
            cursor = 0
            while True:
                page = await client.list_blocks(info.node_id, tier, cursor, 30, DEADLINE)
                placed[info.node_id, tier].update(page.hashes)
                cursor = page.cursor
                if not cursor:
                    break
    return placed


def events(*payloads: list[Any]) -> bytes:
    return b"".join(
        encode_frame(FrameType.EVENT, RawServerEnd.SESSION, 1, msgspec.msgpack.encode(payload)) for payload in payloads
    )


SPOILT = {
    "another message": (events([DONE]), ProtocolError),
    "a reply": (encode_frame(FrameType.REPLY, RawServerEnd.SESSION, 1, b"\x91\x04"), ProtocolError),
    "garbage": (b"x" * 40, ProtocolError),
    "the end": (b"", MasterUnavailable),
    "an error": (
        encode_frame(FrameType.ERROR, RawServerEnd.SESSION, 0, msgspec.msgpack.encode([3, 9, "stops"])),
        MasterUnavailable,
    ),
}


@pytest.mark.parametrize(("data", "kind"), SPOILT.values(), ids=SPOILT)
def test_a_watch_ends_with_what_was_wrong(tmp_path: Path, data: bytes, kind: type[Exception]) -> None:
    def script(end: RawServerEnd) -> None:
        end.welcome()
        assert end.receive()[2] == [WATCH, 3, 4]
        end.socket.sendall(events([CHANGES, 3, 4, False, []], [CHANGES, 3, 5, True, []]) + data)
        end.socket.shutdown(1)
        end.until_closed()

    async def watch(address: str) -> list[int]:
        pages = NativeAsyncClient(address).watch(3, 4, timeout=DEADLINE)
        first = await anext(pages)
        with pytest.raises(kind):
            await anext(pages)
        return [first.cursor]

    with FakeMaster(tmp_path / "s", script) as fake:
        assert asyncio.run(watch(fake.address)) == [5]


@pytest.mark.parametrize("greets", [True, False])
def test_a_watch_of_a_master_that_is_silent_ends(tmp_path: Path, greets: bool) -> None:
    """Of one that does not greet, the system has taken the connection."""

    def greets_and_is_silent(end: RawServerEnd) -> None:
        end.welcome()
        end.until_closed()

    async def watch(address: str) -> None:
        pages = NativeAsyncClient(address).watch(timeout=DEADLINE if greets else 0.05, silence=0.05)
        with pytest.raises(MasterUnavailable, match="no answer in time"):
            await anext(pages)

    with FakeMaster(tmp_path / "s", *[greets_and_is_silent] * greets) as fake:
        asyncio.run(asyncio.wait_for(watch(fake.address), DEADLINE))
