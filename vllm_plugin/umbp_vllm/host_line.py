"""Whether there is a daemon, which arena it has, and what is said to it: the state that loans and stores share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from umbp_connectors.daemon.pages import DaemonArena
from umbp_core.ops import CHECKSUM_BYTES
from umbp_core.ports import Clock
from umbp_vllm.host_talk import Talker
from umbp_vllm.host_words import Answer, Attached, Clear, Gone, Order
from umbp_vllm.known_keys import KnownKeys
from umbp_vllm.stats import UmbpStats

logger = logging.getLogger("vllm.umbp.host")


@dataclass(frozen=True, slots=True)
class RankStripes:
    """How one page is divided among the ranks: ``of[rank]`` is the stripe that a world rank reads.

    ``writers`` are the world ranks that write, in the order of the stripes.
    """

    of: tuple[int, ...]
    writers: tuple[int, ...]

    def stored(self, checksums: bytes) -> bytes:
        """The checksums of all stripes, from those of all world ranks."""
        if len(self.of) == len(self.writers):
            return checksums
        return b"".join(checksums[rank * CHECKSUM_BYTES : (rank + 1) * CHECKSUM_BYTES] for rank in self.writers)

    def expected(self, checksums: bytes) -> bytes:
        """The checksums for all world ranks, from those of all stripes."""
        if len(self.of) == len(self.writers):
            return checksums
        return b"".join(checksums[part * CHECKSUM_BYTES : (part + 1) * CHECKSUM_BYTES] for part in self.of)


class HostLine:
    """Scheduler thread only; nothing here waits.  ``arenas`` are those that the ranks have mapped."""

    def __init__(self, talker: Talker, arenas: Sequence[bytes], clock: Clock, stats: UmbpStats) -> None:
        self._talker = talker
        self._mapped = list(arenas)
        self._up = False
        self._clears = 0
        self._warned = False
        self.clock = clock
        self.stats = stats
        self.arena: DaemonArena | None = None
        self.life = 0
        """Grows with each arena; what belongs to an earlier one is void."""
        self.epoch = 0
        """Grows when answers of before count no more."""
        self.known = KnownKeys()
        """Blocks that the pool is believed to hold."""

    def open(self) -> None:
        """Start talking."""
        self._talker.open()

    def say(self, order: Order) -> None:
        """Have the daemon told."""
        self._talker.say(order)

    def take(self) -> Answer | None:
        """The next answer, if there is one."""
        return self._talker.take()

    def close(self, timeout: float) -> None:
        """Have said what was ordered, and leave; bounded in time."""
        if not self._talker.close(timeout):
            logger.warning("umbp: the daemon does not answer; what it was not told of is lost")

    @property
    def usable(self) -> bool:
        """Whether the daemon answers, all ranks have its memory mapped, and what it holds is of now."""
        arena = self.arena
        return self._up and arena is not None and not self._clears and all(name == arena.name for name in self._mapped)

    @property
    def clearing(self) -> bool:
        """Whether the pool may still hold what was to be forgotten."""
        return bool(self._clears)

    @property
    def starting(self) -> bool:
        """Whether nobody knows yet if there is a daemon."""
        return not self.life and not self._warned

    def mapped(self, rank: int, name: bytes) -> None:
        """World rank ``rank`` has mapped the arena ``name``."""
        self._mapped[rank] = name

    def attached(self, answer: Attached) -> bool:
        """There is a daemon; whether it is another one than before."""
        self._up = True
        if self._warned:
            self._warned = False
            logger.info("umbp: the daemon answers again")
        if answer.life == self.life:
            return False
        self.life, self.arena = answer.life, answer.arena
        self.epoch += 1
        self.known.clear()
        return True

    def gone(self, answer: Gone) -> None:
        """It does not answer any more."""
        self._up = False
        if not self._warned:
            self._warned = True
            self.stats.add("vllm:umbp_degraded", 1, "daemon_gone")
            logger.warning("umbp: no daemon, so nothing is loaded or stored until there is one: %s", answer.reason)

    def clear(self) -> None:
        """Have every object forgotten."""
        self._clears += 1
        self.epoch += 1
        self.known.clear()
        self.say(Clear())

    def cleared(self) -> None:
        """It was."""
        self._clears -= 1
