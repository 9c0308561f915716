"""A started op's end is said once, and by its absence when the executor is gone."""

from __future__ import annotations

import gc

import pytest

from umbp_core.completion import CompletionHandle
from umbp_core.errors import StateError
from umbp_core.ops import Direction, LeaderTransferRequest, OpResult, OpStatus

OP = LeaderTransferRequest("op", "request", Direction.STORE, ())
DONE = OpResult("op", "request", Direction.STORE, OpStatus.DONE)


class Ends:
    """What a handle says."""

    def __init__(self, refuses: int = 0) -> None:
        self.refuses = refuses
        self.said: list[OpResult] = []
        self.lost: list[LeaderTransferRequest] = []

    def handle(self) -> CompletionHandle:
        return CompletionHandle(OP, self._complete, self.lost.append)

    def _complete(self, result: OpResult) -> None:
        if self.refuses:
            self.refuses -= 1
            raise StateError("not committed")
        self.said.append(result)


def test_a_handle_is_consumed_once() -> None:
    ends = Ends()
    handle = ends.handle()
    assert handle.consume(DONE)
    assert not handle.consume(DONE)
    del handle
    gc.collect()
    assert (ends.said, ends.lost) == ([DONE], [])


def test_a_handle_that_is_dropped_says_so() -> None:
    ends = Ends()
    handle = ends.handle()
    del handle
    gc.collect()
    assert (ends.said, ends.lost) == ([], [OP])


def test_what_was_refused_was_not_said() -> None:
    ends = Ends(refuses=1)
    handle = ends.handle()
    with pytest.raises(StateError):
        handle.consume(DONE)
    assert handle.consume(DONE)
    del handle
    gc.collect()
    assert (ends.said, ends.lost) == ([DONE], [])
