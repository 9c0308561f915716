"""How full the daemon's tiers are, for a master: asked by one thread, found out by the one that talks to the daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from umbp_core.master.model import TierCapacity
from umbp_vllm.host_words import Measure, Order


class HostCapacities:
    """What was heard last; each call has the daemon asked anew by ``say``.  One thread calls, and never waits."""

    def __init__(self, say: Callable[[Order], None]) -> None:
        self._say = say
        self._asked = False
        self._heard: Sequence[TierCapacity] = ()

    def __call__(self) -> Sequence[TierCapacity]:
        """Nothing, before the first answer and while there is no daemon."""
        if not self._asked:
            self._asked = True
            self._say(Measure(self._hear))
        return self._heard

    def _hear(self, capacities: Sequence[TierCapacity]) -> None:
        """In the thread that talks to the daemon."""
        self._heard, self._asked = capacities, False
