"""Nobody waits for room on a connection while there is some, whoever comes, goes, is answered or is late."""

from __future__ import annotations

import asyncio
from typing import cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from umbp_connectors.client.native_pipe import NativePipe
from umbp_connectors.client.native_session import Identity
from umbp_core.errors import MasterError
from umbp_core.wire.codec import encode
from umbp_core.wire.frames import FrameType, encode_frame
from umbp_core.wire.messages import ClearNode, ListNodes
from umbp_core.wire.replies import Done, Welcome

LIMIT, SESSION, MAX_REQUEST = 2, 5, 100
TOO_MUCH = ClearNode("n" * MAX_REQUEST)
TURNS = 12
"""Of the loop, after which whoever can go on has done so."""

patience = st.sampled_from((1, 3, 10))


class HandLoop(asyncio.SelectorEventLoop):
    """A loop whose clock is moved by hand."""

    now = 0.0

    def time(self) -> float:
        return self.now


class NoTransport:
    """Takes everything."""

    def write(self, data: bytes) -> None:
        """It is the master's."""

    def abort(self) -> None:
        """It ends."""


async def turns() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


class PipeMachine(RuleBasedStateMachine):
    """Callers of one connection; what is under way is counted beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = HandLoop()
        self.pipe = NativePipe("/master", Identity(), LIMIT, self.loop)
        self.pipe.connection_made(cast("asyncio.Transport", NoTransport()))
        welcome = encode(Welcome(1, SESSION, MAX_REQUEST, "fake"))
        self.pipe.data_received(encode_frame(FrameType.HELLO, 0, 0, welcome))
        self.calls: list[asyncio.Task[None]] = []
        self.waits: dict[asyncio.Task[None], float] = {}
        self.under_way: dict[int, float] = {}
        self.asked = 0
        self.stalled = False

    async def _call(self, request: ClearNode | ListNodes, deadline: float) -> None:
        """What the client does for each of its callers."""
        me = cast("asyncio.Task[None]", asyncio.current_task())
        if self.pipe.full:
            self.waits[me] = deadline
            try:
                await self.pipe.room(deadline)
            finally:
                del self.waits[me]
        answer = self.pipe.ask(request, deadline)
        assert request is not TOO_MUCH
        self.asked += 1
        self.under_way[self.asked] = deadline
        await answer

    @rule(patience=patience, too_much=st.booleans())
    def come(self, patience: int, too_much: bool) -> None:
        request = TOO_MUCH if too_much else ListNodes()
        self.calls.append(self.loop.create_task(self._call(request, self.loop.now + patience)))

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.calls)).cancel()

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        sequences = data.draw(st.lists(st.sampled_from(sorted(self.under_way)), min_size=1, unique=True))
        frames = [encode_frame(FrameType.REPLY, SESSION, sequence, encode(Done())) for sequence in sequences]
        self.pipe.data_received(b"".join(frames))
        for sequence in sequences:
            del self.under_way[sequence]

    @rule(seconds=patience)
    def pass_time(self, seconds: int) -> None:
        self.loop.now += seconds

    @rule()
    def stall(self) -> None:
        if self.stalled:
            self.pipe.resume_writing()
        else:
            self.pipe.pause_writing()
        self.stalled = not self.stalled

    @rule()
    def settle(self) -> None:
        """Everybody goes as far as possible; then those that wait have a reason."""
        self.loop.run_until_complete(turns())
        now = self.loop.now
        self.under_way = {sequence: late for sequence, late in self.under_way.items() if late > now}
        assert len(self.under_way) <= LIMIT
        assert not any(late <= now for late in self.waits.values())
        if not self.stalled and len(self.under_way) < LIMIT:
            assert not self.waits
            assert not self.pipe.full

    def teardown(self) -> None:
        try:
            self.settle()
            self.pipe.close()
            self.loop.run_until_complete(turns())
            assert not self.waits
            for call in self.calls:
                assert call.cancelled() or isinstance(call.exception(), MasterError | None)
        finally:
            self.loop.close()


TestPipe = PipeMachine.TestCase
TestPipe.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
