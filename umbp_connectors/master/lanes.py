"""Running steps on an asyncio loop: others are let in between two, and changes of one node keep their order."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from types import coroutine
from typing import Any, TypeVar

from umbp_core.master.changes import Steps, finish

T = TypeVar("T")


@coroutine
def breathe() -> Generator[None, None, None]:
    """Let the loop do what else is ready, then go on."""
    yield


async def run_steps(steps: Steps[T]) -> T:
    """Run ``steps`` to their end, letting others in between two."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            answer: T = stop.value
            return answer
        await breathe()


class Lanes:
    """Changes of one node one after the other, in the order of the calls.

    A small change is done at one go unless another of its node is under way.  A change is done to its end even when
    its caller is cancelled: half of it would be no use to anybody.
    """

    def __init__(self) -> None:
        self._last: dict[str, asyncio.Task[Any]] = {}

    async def run(self, node_id: str, steps: Steps[T], large: bool) -> T:
        """Run the steps of a change of ``node_id``."""
        before = self._last.get(node_id)
        if before is None and not large:
            return finish(steps)
        task = asyncio.get_running_loop().create_task(self._run(node_id, steps, before))
        task.add_done_callback(_look)
        self._last[node_id] = task
        return await asyncio.shield(task)

    async def _run(self, node_id: str, steps: Steps[T], before: asyncio.Task[Any] | None) -> T:
        try:
            if before is not None:
                await asyncio.wait([before])
            return await run_steps(steps)
        finally:
            if self._last.get(node_id) is asyncio.current_task():
                del self._last[node_id]


def _look(task: asyncio.Task[Any]) -> None:
    """Whoever asked for a change may be gone when it fails; then nobody is left to be told."""
    if not task.cancelled():
        task.exception()
