"""How far the worker's forward pass is, and which ops wait for what of it."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from umbp_core.ops import Requirement, RequirementKind

_NOTHING = -1

#: What an op waits for inside an iteration: its end, a layer by name, or a layer by index.
_Point = tuple[RequirementKind, "str | int"]

_POINT_OF: dict[RequirementKind, Callable[[Requirement], _Point]] = {
    RequirementKind.ITERATION_COMPLETE: lambda r: (r.kind, ""),
    RequirementKind.LAYER_NAME_COMPLETE: lambda r: (r.kind, r.layer_name),
    RequirementKind.LAYER_COMPLETE: lambda r: (r.kind, r.layer_index),
}


class Progress:
    """Evaluates :class:`~umbp_core.ops.Requirement` as iterations and layers end.  One thread.

    Iterations are the leader's step numbers and only grow; an old number is a replay and changes nothing.
    The end of iteration *n* also ends every earlier one, so that a step whose hook never ran delays its
    ops by one step and does not lose them.  A layer requirement means exactly that layer of exactly that
    iteration, and is met at the latest when the iteration ends.  Costs are proportional to the ops that
    a call releases.
    """

    def __init__(self) -> None:
        self._current = _NOTHING
        self._completed = _NOTHING
        self._layers: set[_Point] = set()
        self._waiting: dict[str, Requirement] = {}
        self._points: dict[int, dict[_Point, dict[str, None]]] = {}
        self._iterations: list[int] = []

    @property
    def current(self) -> int:
        """The iteration that began last, -1 before the first."""
        return self._current

    @property
    def completed(self) -> int:
        """The newest iteration that ended, -1 before the first."""
        return self._completed

    def __len__(self) -> int:
        return len(self._waiting)

    def holds(self, requirement: Requirement) -> bool:
        """Whether the condition is met now; once met, it stays met."""
        if requirement.kind is RequirementKind.NONE or requirement.iteration <= self._completed:
            return True
        return requirement.iteration == self._current and _POINT_OF[requirement.kind](requirement) in self._layers

    def wait(self, key: str, requirement: Requirement) -> bool:
        """True when the requirement holds now; else ``key`` is returned by the call that fulfils it."""
        if self.holds(requirement):
            return True
        self._waiting[key] = requirement
        points = self._points.get(requirement.iteration)
        if points is None:
            points = self._points[requirement.iteration] = {}
            heapq.heappush(self._iterations, requirement.iteration)
        points.setdefault(_POINT_OF[requirement.kind](requirement), {})[key] = None
        return False

    def discard(self, key: str) -> None:
        """Forget a key that waits; a no-op for others."""
        requirement = self._waiting.pop(key, None)
        if requirement is None:
            return
        points = self._points[requirement.iteration]
        point = _POINT_OF[requirement.kind](requirement)
        del points[point][key]
        if not points[point]:
            del points[point]

    def begin_iteration(self, iteration: int) -> None:
        """Step ``iteration`` started; layers are counted anew."""
        if iteration > self._current:
            self._current = iteration
            self._layers.clear()

    def layer_done(self, name: str, index: int) -> list[str]:
        """One layer of the current iteration ended; returns the keys that this releases."""
        released: list[str] = []
        reached: tuple[_Point, ...] = (
            (RequirementKind.LAYER_NAME_COMPLETE, name),
            (RequirementKind.LAYER_COMPLETE, index),
        )
        points = self._points.get(self._current, {})
        for point in reached:
            self._layers.add(point)
            released += points.pop(point, {})
        return self._release(released)

    def end_iteration(self, iteration: int) -> list[str]:
        """Step ``iteration`` ended, and with it all before; returns the keys that this releases."""
        if iteration <= self._completed:
            return []
        self.begin_iteration(iteration)
        self._completed = iteration
        released: list[str] = []
        while self._iterations and self._iterations[0] <= iteration:
            for keys in self._points.pop(heapq.heappop(self._iterations)).values():
                released += keys
        return self._release(released)

    def _release(self, keys: list[str]) -> list[str]:
        for key in keys:
            del self._waiting[key]
        return keys
