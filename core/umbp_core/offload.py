"""Offload policies: which blocks may go from one tier to a slower one.

A policy is asked with the blocks that are about to be copied, and answers for each whether it may.  It knows neither
pages nor transfers: what it admits may still find no room.  Policies are combined by :class:`AllOf`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from umbp_core.errors import ConfigError, StateError

LEAST_PRIORITY = 0
MOST_PRIORITY = 100
DEFAULT_PRIORITY = 35
"""The priority of a block about which nobody said anything: what TensorRT-LLM gives it."""


@dataclass(frozen=True, slots=True)
class OffloadRun:
    """Blocks that could go to a tier, in the order of their chain; there may be gaps between them.

    ``priorities`` has one entry for each of ``keys``, from 0 to 100, or none where nobody knows any.  An entry is the
    lowest priority of its block and all blocks before it in the chain (:func:`prefix_priorities`), because a block is
    of no use without those.
    """

    keys: Sequence[bytes]
    priorities: Sequence[int] = ()

    def only(self, wanted: Sequence[bool]) -> OffloadRun:
        """The blocks for which ``wanted`` is true."""
        keys = [key for key, want in zip(self.keys, wanted, strict=True) if want]
        if not self.priorities:
            return OffloadRun(keys)
        return OffloadRun(keys, [level for level, want in zip(self.priorities, wanted, strict=True) if want])


def prefix_priorities(own: Iterable[int], before: int = MOST_PRIORITY) -> list[int]:
    """The lowest priority up to each block, of blocks with the priorities ``own`` that follow each other in a chain.

    ``before`` is the lowest of what comes before them.
    """
    return list(accumulate(own, min, initial=before))[1:]


class OffloadPolicy(Protocol):
    """Decides what may go to one tier.  One thread; never waits."""

    def admit(self, run: OffloadRun, now: float) -> Sequence[bool]:
        """For each block of ``run`` whether it may go.  Whoever asks is about to copy what may.

        ``now`` is in seconds of the caller's monotonic clock and never goes back.
        """
        ...


class PassAll:
    """Everything may go."""

    def admit(self, run: OffloadRun, now: float) -> list[bool]:
        """Yes, for each."""
        return [True] * len(run.keys)


class Presence:
    """What is there already does not go again.  ``present`` says for each of some keys whether it is."""

    def __init__(self, present: Callable[[Sequence[bytes]], Sequence[bool]]) -> None:
        self._present = present

    def admit(self, run: OffloadRun, now: float) -> list[bool]:
        """Yes for what is not there."""
        return [not there for there in self._present(run.keys)]


class PriorityThreshold:
    """Of every chain, the longest prefix whose blocks all have a priority of at least ``least``; 0 admits everything.

    After a block that may not go, no later one of its chain does: it could not be used.
    """

    def __init__(self, least: int) -> None:
        if not LEAST_PRIORITY <= least <= MOST_PRIORITY:
            raise ConfigError(
                f"a lowest priority of {least} is none; give one from {LEAST_PRIORITY} to {MOST_PRIORITY}"
            )
        self._least = least

    def admit(self, run: OffloadRun, now: float) -> list[bool]:
        """Yes for the blocks before the first whose priority is too low."""
        levels = run.priorities or [DEFAULT_PRIORITY] * len(run.keys)
        return [lowest >= self._least for lowest in prefix_priorities(levels)]


class Frequency:
    """A block may go when it is seen often enough: with ``min_sightings`` of 2, from the second time on.

    A block's count is 1 when it is first seen and doubles each time it is seen again; all counts are lowered by one
    every ``window_s`` seconds, and forgotten at 0.  A block may go when its count has reached what ``min_sightings``
    sightings without a pause give.  At most ``capacity`` blocks are counted: for one more, all counts are lowered
    until some are forgotten.

    What is kept of a block is the age at which its count is 0, so that time passes without a look at any; what is
    over is forgotten a few at a time, by those who come.
    """

    SWEEP = 8
    """Blocks that are forgotten for each one that is new.  More than one, or what is over would never be gone."""
    MOST_COUNT = 1 << 10
    """Where counts stop doubling, so that a block that was popular is forgotten some day (after a week of windows)."""

    def __init__(self, min_sightings: int = 2, window_s: float = 600.0, capacity: int = 1_000_000) -> None:
        most = self.MOST_COUNT.bit_length()
        if not 1 <= min_sightings <= most or window_s <= 0 or capacity < 1:
            raise ConfigError(
                f"{min_sightings} sightings in windows of {window_s} s of at most {capacity} blocks cannot be counted; "
                f"give 1 to {most} sightings, a window above 0 and a capacity above 0"
            )
        self._threshold = 1 << (min_sightings - 1)
        self._window_s = window_s
        self._capacity = capacity
        self._window: int | None = None
        self._age = 0
        self._over_at: dict[int, int] = {}
        self._of_age: dict[int, set[int]] = {}
        self._over: list[int] = []
        """Ages of ``_of_age`` whose blocks have a count of 0 and are still to be forgotten."""
        self._counted = 0

    @property
    def counted(self) -> int:
        """Blocks whose count is above 0."""
        return self._counted

    @property
    def kept(self) -> int:
        """Blocks that take memory: those that are counted, and those that are over and not forgotten yet."""
        return len(self._over_at)

    def admit(self, run: OffloadRun, now: float) -> list[bool]:
        """Count every block of ``run`` as seen; yes for those seen often enough."""
        self.pass_time(now)
        # The hash of a key is 64 bits: a tenth of the memory of the key, and a mistake in 10^13 costs one copy.
        return [self._seen(hash(key)) >= self._threshold for key in run.keys]

    def count(self, key: bytes) -> int:
        """The count of ``key`` as of the latest call; 0 when it is not counted."""
        return max(0, self._over_at.get(hash(key), self._age) - self._age)

    def pass_time(self, now: float) -> None:
        """Let the windows end that are over at ``now``; they begin at multiples of their length."""
        window = int(now // self._window_s)
        if self._window is None:
            self._window = window
        elif window > self._window:
            self._grow_older(window - self._window)
            self._window = window

    def _seen(self, block: int) -> int:
        over_at = self._over_at.get(block)
        if over_at is None or over_at <= self._age:
            if over_at is not None:
                self._forget(block, over_at)
            count = 1
            self._make_room()
            self._counted += 1
        else:
            count = min(2 * (over_at - self._age), self.MOST_COUNT)
            if over_at == self._age + count:
                return count
            self._forget(block, over_at)
        self._over_at[block] = self._age + count
        self._of_age.setdefault(self._age + count, set()).add(block)
        return count

    def _make_room(self) -> None:
        if self._counted >= self._capacity:
            self._grow_older(min(age for age in self._of_age if age > self._age) - self._age)
        for _ in range(self.SWEEP):
            if not self._over:
                return
            over_at = self._over[-1]
            self._forget(self._of_age[over_at].pop(), over_at)

    def _grow_older(self, windows: int) -> None:
        before, self._age = self._age, self._age + windows
        over = [age for age in self._of_age if before < age <= self._age]
        self._counted -= sum(len(self._of_age[age]) for age in over)
        self._over += over

    def _forget(self, block: int, over_at: int) -> None:
        del self._over_at[block]
        same = self._of_age[over_at]
        same.discard(block)
        if not same:
            del self._of_age[over_at]
            if over_at <= self._age:
                self._over.remove(over_at)


class AllOf:
    """Several policies that have to agree, asked in their order: what one refuses, the next is not asked about.

    ``refused`` is told how many blocks a policy, given by its name, has refused.
    """

    def __init__(self, policies: Mapping[str, OffloadPolicy], refused: Callable[[str, int], None]) -> None:
        self._policies = dict(policies)
        self._refused = refused

    def admit(self, run: OffloadRun, now: float) -> list[bool]:
        """Yes for what all of them admit.  Raises ``StateError`` when one does not answer for each block."""
        left = list(range(len(run.keys)))
        rest = run
        for name, policy in self._policies.items():
            if not left:
                break
            answers = policy.admit(rest, now)
            if len(answers) != len(left):
                raise StateError(
                    f"the offload policy {name!r} gave {len(answers)} answers for {len(left)} blocks; leave it out"
                )
            admitted = [index for index, answer in zip(left, answers, strict=True) if answer]
            if len(admitted) < len(left):
                self._refused(name, len(left) - len(admitted))
                rest = rest.only(answers)
            left = admitted
        verdict = [False] * len(run.keys)
        for index in left:
            verdict[index] = True
        return verdict
