"""What the leader asks before blocks go to a tier, and what their requests say they are worth.

Nothing here is called with the policies that are the default.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from umbp_connectors.hookspecs import OffloadSpec
from umbp_connectors.leader.demotions import DemotionQueue
from umbp_connectors.offload import OffloadGate
from umbp_connectors.plugins import PluginHost
from umbp_core.errors import ConfigError
from umbp_core.ports import Clock
from umbp_core.tiers import Tier, TierSet
from umbp_vllm.directories import Written
from umbp_vllm.groups import KvGroup
from umbp_vllm.priorities import RequestPriorities
from umbp_vllm.requests import RequestState
from umbp_vllm.stats import UmbpStats

logger = logging.getLogger("vllm.umbp.offload")

_IN_DRAM_ONLY = TierSet.of(Tier.DRAM)


class Priorities:
    """The priorities of requests, read when they are first needed."""

    def __init__(self, stats: UmbpStats) -> None:
        self._stats = stats

    def of(self, state: RequestState, group: KvGroup, indices: Sequence[int]) -> list[int]:
        """For each of the blocks ``indices`` of ``group`` the lowest priority up to its end."""
        known = state.priorities
        if known is None:
            known = state.priorities = self._read(state)
        return [known.lowest((index + 1) * group.block_tokens) for index in indices]

    def _read(self, state: RequestState) -> RequestPriorities:
        try:
            return RequestPriorities.of(state.request)
        except ConfigError as error:
            self._stats.add("vllm:umbp_degraded", 1, "priority")
            logger.warning("request %s counts as one that says no priority: %s", state.request.request_id, error)
            return RequestPriorities.unsaid(state.request)


class StoreGate:
    """The gate between HBM and DRAM.  Scheduler thread only."""

    def __init__(self, gate: OffloadGate, directory: Written, priorities: Priorities) -> None:
        self._gate = gate
        self._directory = directory
        self._priorities = priorities

    def left_out(self, state: RequestState, group: KvGroup, first: int, keys: Sequence[bytes]) -> list[bool]:
        """For each of ``keys``, the blocks of ``group`` from ``first`` on, whether it is not to be stored.

        That is what DRAM has or is getting, and what a policy refuses.
        """
        there = self._directory.is_present_or_pending
        left_out = [there(key, Tier.DRAM) for key in keys]
        offered = [index for index, out in enumerate(left_out) if not out]
        if offered:
            levels = self._priorities.of(state, group, [first + index for index in offered])
            answers = self._gate.admit([keys[index] for index in offered], levels)
            for index, answer in zip(offered, answers, strict=True):
                left_out[index] = not answer
        return left_out


class DemotionGate:
    """The gate between DRAM and SSD.  Scheduler thread only.

    A block is offered when it came to DRAM, and again by each request that uses it there, so that what a policy refused
    at first may go later.
    """

    def __init__(
        self,
        gate: OffloadGate,
        directory: Written,
        groups: Sequence[KvGroup],
        demotions: DemotionQueue,
        priorities: Priorities,
    ) -> None:
        self._gate = gate
        self._directory = directory
        self._groups = groups
        self._demotions = demotions
        self._priorities = priorities

    def admitted(self, keys: Sequence[bytes], priorities: Sequence[int]) -> set[bytes]:
        """Those of ``keys``, which have just come to DRAM, that may go to SSD."""
        tiers = self._directory.tiers_of
        new = [(key, level) for key, level in zip(keys, priorities, strict=True) if tiers(key) == _IN_DRAM_ONLY]
        answers = self._gate.admit([key for key, _ in new], [level for _, level in new]) if new else ()
        return {key for (key, _), answer in zip(new, answers, strict=True) if answer}

    def used(self, state: RequestState, tokens: int) -> None:
        """The first ``tokens`` of the request were found in HBM or in the pool: a sighting, once per request."""
        if state.sighted:
            return
        state.sighted = True
        for group in self._groups:
            keys = state.keys.of(group)[: tokens // group.block_tokens]
            depths = [depth for depth, key in enumerate(keys) if self._directory.tiers_of(key) == _IN_DRAM_ONLY]
            if not depths:
                continue
            answers = self._gate.admit([keys[depth] for depth in depths], self._priorities.of(state, group, depths))
            for depth, answer in zip(depths, answers, strict=True):
                if answer:
                    self._demotions.offer(keys[depth], group.index, depth)


@dataclass(frozen=True, slots=True)
class Gates:
    """The gates that have something to ask."""

    stores: StoreGate | None = None
    demotions: DemotionGate | None = None
    priorities: Priorities | None = None
    """Of what is stored, where a gate before SSD or a tier's eviction asks for them."""


NO_GATES = Gates()


def make_gates(
    plugins: PluginHost,
    directory: Written,
    groups: Sequence[KvGroup],
    demotions: DemotionQueue | None,
    clock: Clock,
    stats: UmbpStats,
) -> Gates:
    """The gates that the configuration asks for.  Raises ``ConfigError`` for a policy that nobody offers."""
    priorities = Priorities(stats)

    def gate(source: Tier, target: Tier) -> OffloadGate | None:
        def refused(policy: str, blocks: int) -> None:
            stats.add("vllm:umbp_refused_blocks", blocks, target.name.lower(), policy)

        def on_ssd(keys: Sequence[bytes]) -> list[bool]:
            return [directory.copy(key, Tier.SSD) is not None for key in keys]

        present = on_ssd if target is Tier.SSD else directory.contains_many
        return plugins.make_offload_gate(OffloadSpec(source, target, present), clock, refused)

    to_dram = gate(Tier.HBM, Tier.DRAM)
    to_ssd = gate(Tier.DRAM, Tier.SSD) if demotions is not None else None
    return Gates(
        None if to_dram is None else StoreGate(to_dram, directory, priorities),
        None if to_ssd is None or demotions is None else DemotionGate(to_ssd, directory, groups, demotions, priorities),
        priorities if to_ssd is not None or directory.knows_priorities else None,
    )
