"""The gate before a tier: the configured offload policies together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from umbp_core.offload import OffloadPolicy, OffloadRun
from umbp_core.ports import Clock

Present = Callable[[Sequence[bytes]], Sequence[bool]]
"""Says for each of some keys whether the pool has it where copying it would gain nothing."""
Refused = Callable[[str, int], None]
"""Takes the name of a policy and how many blocks it refused."""


class OffloadGate:
    """Asks the policies of one edge between tiers.  One thread at a time."""

    def __init__(self, policy: OffloadPolicy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock

    def admit(self, keys: Sequence[bytes], priorities: Sequence[int] = ()) -> Sequence[bool]:
        """For each of ``keys``, in the order of their chain, whether it may go; see ``OffloadRun``."""
        return self._policy.admit(OffloadRun(keys, priorities), self._clock())


GateMaker = Callable[[Present, Clock, Refused], OffloadGate | None]
"""Makes the gate before a tier; ``None`` where nothing has to be asked."""
