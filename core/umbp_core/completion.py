"""The duty to say how a started op ended."""

from __future__ import annotations

from collections.abc import Callable

from umbp_core.ops import LeaderTransferRequest, OpResult


class CompletionHandle:
    """Whoever executes an op holds one, and consumes it when it has touched the op's memory for the last time.

    A handle that is dropped unconsumed means that the op's executor is gone: ``lost`` is called with the op, wherever
    and whenever the interpreter notices, so it must neither wait nor take a lock.  One thread at a time.
    """

    __slots__ = ("_complete", "_consumed", "_lost", "_op")

    def __init__(
        self,
        op: LeaderTransferRequest,
        complete: Callable[[OpResult], None],
        lost: Callable[[LeaderTransferRequest], object],
    ) -> None:
        self._consumed = False
        self._op = op
        self._complete = complete
        self._lost = lost

    def consume(self, result: OpResult) -> bool:
        """Say how the op ended.  False, with nothing said, when that was said before.

        A result that is refused (an exception leaves this method) was not said.
        """
        if self._consumed:
            return False
        self._complete(result)
        self._consumed = True
        return True

    def __del__(self) -> None:
        if not self._consumed:
            self._lost(self._op)
