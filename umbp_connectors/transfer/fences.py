"""Points on the engine's stream that ops are ordered after."""

from __future__ import annotations

from typing import Final

from umbp_core.ops import LeaderTransferRequest, RequirementKind

_KEPT: Final = 64
"""Iterations whose own fence is remembered; an op of an older one waits for a later fence, which is also right."""


class Fences:
    """The newest fence, and those behind the last iterations.  The engine's lock must be held."""

    def __init__(self) -> None:
        self._behind: dict[int, object] = {}
        self.newest: object = None
        self.has_any = False

    def advance(self, fence: object) -> None:
        """``fence`` lies behind everything that was launched until now."""
        self.newest = fence
        self.has_any = True

    def end_iteration(self, n: int, fence: object) -> None:
        """``fence`` lies behind the forward pass of step ``n``; the first one said of a step counts."""
        self.advance(fence)
        self._behind.setdefault(n, fence)
        if len(self._behind) > _KEPT:
            del self._behind[next(iter(self._behind))]

    def behind(self, n: int) -> object:
        """The fence behind step ``n``, or a later one."""
        return self._behind.get(n, self.newest)

    def of(self, op: LeaderTransferRequest) -> object:
        """What ``op`` comes after on the device."""
        return self.newest if op.requirement.kind is RequirementKind.NONE else self.behind(op.requirement.iteration)
