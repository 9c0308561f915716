"""The leader's load side: match, promise, load, and the end of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from umbp_connectors.leader.ledger import Verdict
from umbp_core.errors import StateError
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpStatus
from umbp_core.tiers import Tier
from umbp_vllm.directories import Read
from umbp_vllm.enquiries import Enquirer
from umbp_vllm.events import EventLog
from umbp_vllm.groups import KvGroup
from umbp_vllm.matching import Matcher, StagedMatch, bare
from umbp_vllm.requests import RequestState
from umbp_vllm.stats import UmbpStats, counter

STAGED_FOR_S = 5.0
"""A match that vLLM neither loads nor asks for again is given up after this time."""

VERIFY_FAILED = "verify"

_LOOKUPS = counter("vllm:umbp_lookups")
_LOOKUP_TOKENS = counter("vllm:umbp_lookup_tokens")
_LOADED_BLOCKS = {tier: counter("vllm:umbp_loaded_blocks", tier) for tier in ("dram", "ssd")}
_HIT_TOKENS = {tier: counter("vllm:umbp_hit_tokens", tier) for tier in ("dram", "ssd")}


class _Load(msgspec.Struct, frozen=True, gc=False):
    """A load in flight, and whether no block of it comes from SSD."""

    state: RequestState
    in_dram: bool


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    """What the configuration says about loads."""

    timeout_s: float
    share_timeout_s: float
    least_tokens: int
    """A match of fewer is not worth a load."""
    share: bool
    """Whether a second request may wait for another's load; useless without vLLM's own prefix cache."""
    layerwise: bool = False
    """Whether what lies in DRAM is loaded by the step that schedules the request."""
    lookup_timeout_s: float = 0.0
    """How long a request waits until its keys are known."""


class LoadPlanner:
    """Stages and plans loads.  Scheduler thread only; never waits.

    ``used`` is told, where anybody wants to know, how many tokens of a request HBM and the pool have.
    ``enquirer`` asks the daemon, where that has the pool, before a request is matched.
    """

    def __init__(
        self,
        directory: Read,
        matcher: Matcher,
        groups: Sequence[KvGroup],
        policy: LoadPolicy,
        events: EventLog,
        stats: UmbpStats,
        used: Callable[[RequestState, int], None] | None = None,
        enquirer: Enquirer | None = None,
    ) -> None:
        self._directory = directory
        self._matcher = matcher
        self._groups = groups
        self._policy = policy
        self._events = events
        self._stats = stats
        self._used = used
        self._enquirer = enquirer
        self._staged: dict[str, RequestState] = {}
        self._loading: set[bytes] = set()
        """What requests may wait for."""
        self._loading_again: Counter[bytes] = Counter()
        """How many more loads than one bring it."""
        self._in_flight: dict[str, _Load] = {}
        self._void: set[str] = set()
        self._filling: set[bytes] = set()

    @property
    def staged(self) -> int:
        """Matches that are promised and not loaded yet."""
        return len(self._staged)

    def match(self, state: RequestState, start: int, now: float) -> int | None:
        """Tokens beyond ``start`` that a load can bring; ``None`` while another request loads them.

        Asking again for the same ``start`` repeats the answer and renews the promise.
        """
        if state.staged is not None:
            if state.staged.start == start and not self._is_stale(state) and not state.keys.are_refused:
                state.staged = msgspec.structs.replace(state.staged, since=now)
                return state.promised
            self.unstage(state)
        if not state.may_load or not state.slot.may_match or state.keys.are_refused:
            return 0
        if not state.keys.are_known:
            return self._not_yet(state, now)
        if self._enquirer is None:
            return self._match(state, start, now)
        if not self._enquirer.ready(state, start, now):
            self._stats.add("vllm:umbp_lookup_waits", 1, "daemon")
            return None
        tokens = self._match(state, start, now)
        if tokens is not None:
            self._enquirer.settled(state)
        return tokens

    def _not_yet(self, state: RequestState, now: float) -> int | None:
        """Not yet, until the time for lookups is over; then a miss."""
        if state.asked_since is None:
            state.asked_since = now
        if now - state.asked_since >= self._policy.lookup_timeout_s:
            return 0
        self._stats.add("vllm:umbp_lookup_waits", 1, "adapter")
        return None

    def _match(self, state: RequestState, start: int, now: float) -> int | None:
        """Look for a match and stage it; as :meth:`match`."""
        request = state.request
        num_tokens = request.num_tokens
        limit = self._matcher.most(num_tokens)
        end = self._matcher.longest(state.keys, start, limit)
        if self._must_wait(state, start, end, now):
            self._stats.add("vllm:umbp_lookup_waits", 1, "shared_load")
            return None
        state.asked_since = None
        if not state.counted and limit - start >= self._matcher.alignment:
            state.counted = True
            self._stats.count(_LOOKUPS, 1)
            self._stats.count(_LOOKUP_TOKENS, num_tokens - start)
        self._matcher.touch(state.keys, end)
        if self._used is not None:
            self._used(state, end)
        if end - start < self._policy.least_tokens:
            return 0
        match = self._matcher.stage(state.keys, start, end, now)
        if match is None:
            return 0
        state.promised, state.at_once = match.tokens, False
        if self._policy.layerwise and match.in_dram:
            # The step that loads at once has to compute a token: of a whole prompt the last one, again.
            state.promised, state.at_once = min(match.tokens, num_tokens - 1 - start), True
        state.staged = match
        state.slot.stage(match.tokens)
        self._staged[request.request_id] = state
        return state.promised

    def fills_prefix(self, state: RequestState, tokens: int) -> bool:
        """Whether any of the first ``tokens`` tokens, which vLLM believes to hold, are being loaded in this very step.

        vLLM lists blocks of a layer-wise load in its prefix cache before they are filled; until they are, nobody else
        may build on them.
        """
        if not self._filling or not tokens:
            return False
        return any(
            not self._filling.isdisjoint(state.keys.bare(group, tokens // group.block_tokens)) for group in self._groups
        )

    def step_planned(self) -> None:
        """The requests of the step are chosen; its layer-wise loads end before those of the next one are."""
        if self._filling:
            self._filling = set()

    def _must_wait(self, state: RequestState, start: int, end: int, now: float) -> bool:
        if not self._policy.share or not self._loading:
            return False
        if self._loading.isdisjoint(self._matcher.keys_needed(state.keys, start, end)):
            return False
        if state.asked_since is None:
            state.asked_since = now
        return now - state.asked_since < self._policy.share_timeout_s

    def unstage(self, state: RequestState) -> None:
        """Give the staged match up, if there is one."""
        match, state.staged = state.staged, None
        if match is not None:
            self._staged.pop(state.request.request_id, None)
            self._matcher.release(match.op_id)
            state.slot.unstage()
            if self._enquirer is not None:
                self._enquirer.reopen(state)

    def give_up(self, state: RequestState) -> None:
        """The engine goes on without a load: nothing is promised and nobody needs to wait for this request."""
        if state.staged is not None:
            self.unstage(state)
        if state.shared_keys:
            self.promoted(state)

    def expire(self, now: float) -> None:
        """Give up promises that nobody asked about for :data:`STAGED_FOR_S`."""
        if not self._staged:
            return
        for state in list(self._staged.values()):
            if state.staged and (now - state.staged.since > STAGED_FOR_S or self._is_stale(state)):
                self.unstage(state)

    def arrived(self, state: RequestState) -> None:
        """A request came that may load."""
        asks = state.keys.are_known and not state.request.skip_reading_prefix_cache
        if self._enquirer is not None and asks:
            self._enquirer.arrived(state)

    def forget(self, state: RequestState) -> None:
        """The request is over, or everything about it is decided anew: nobody waits for an answer any more."""
        if self._enquirer is not None:
            self._enquirer.forget(state)

    def _is_stale(self, state: RequestState) -> bool:
        """Whether what is staged was lent too long ago to be loaded."""
        staged = state.staged
        return self._enquirer is not None and staged is not None and self._enquirer.is_stale(staged.op_id)

    def load(self, state: RequestState, tokens: int, tables: Sequence[Sequence[int]]) -> LeaderTransferRequest:
        """The op that loads ``tokens`` of the staged match.

        Raises ``StateError`` and gives the match up when vLLM asks for what was not promised.
        """
        match = state.staged
        if match is None:
            raise StateError(f"request {state.request.request_id}: {tokens} external tokens without a staged match")
        wanted = match.tokens if tokens == state.promised else tokens
        try:
            blocks = self._matcher.load_blocks(match, wanted, tables)
            state.slot.begin_onboard(match.op_id)
        except StateError:
            self.unstage(state)
            raise
        state.staged = None
        self._staged.pop(state.request.request_id, None)
        state.loading = match.op_id
        if state.shared_keys:  # the engine may not have said that it took over an earlier load
            self.promoted(state)
        state.shared_keys = tuple([block.key for block in blocks])
        if self._policy.share:
            again = self._loading.intersection(state.shared_keys)
            if again:
                self._loading_again.update(again)
            self._loading.update(state.shared_keys)
        if state.at_once:
            self._filling.update(map(bare, state.shared_keys))
        self._in_flight[match.op_id] = _Load(state, match.in_dram)
        if self._events.enabled:
            for run in match.runs:
                for index, key in enumerate(run.keys, run.first):
                    self._events.remember(state.request, run.group, index, key)
        state.hit_tokens = self._by_tier(match, tokens)
        for tier, count in state.hit_tokens.items():
            self._stats.count(_HIT_TOKENS[tier], count)
        return LeaderTransferRequest(
            op_id=match.op_id,
            request_id=state.request.request_id,
            direction=Direction.LOAD,
            blocks=blocks,
            timeout_s=self._policy.timeout_s,
            layerwise=state.at_once,
        )

    def _by_tier(self, match: StagedMatch, tokens: int) -> dict[str, int]:
        from_ssd = min(tokens, match.tokens_from_ssd)
        if not from_ssd:
            return {"dram": tokens}
        return {"dram": tokens - from_ssd, "ssd": from_ssd} if from_ssd < tokens else {"ssd": from_ssd}

    def promoted(self, state: RequestState) -> None:
        """The engine has taken the loaded blocks over (or the request is gone): nobody needs to wait any more."""
        keys, state.shared_keys = state.shared_keys, ()
        self._loading.difference_update(self._loaded_by_no_other(keys) if self._loading_again else keys)

    def _loaded_by_no_other(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of ``keys``, which one load brings no more, that no other load brings either."""
        again = self._loading_again
        others = [key for key in keys if key in again]
        last = [key for key in keys if key not in again]
        again.subtract(others)
        for key in others:
            if not again[key]:
                del again[key]
        return last

    def part_from_ssd(self, op: LeaderTransferRequest) -> float:
        """How many of the blocks of a load that is being ended lay on SSD, as a part of all."""
        load = self._in_flight.get(op.op_id)
        if load is not None and load.in_dram:
            return 0.0
        return sum(block.ssd_slot >= 0 for block in op.blocks) / max(1, len(op.blocks))

    def ended(self, verdict: Verdict) -> Iterable[RequestState]:
        """Take the end of a load: publishes what SSD gave to DRAM, drops what did not verify.

        Returns the request it was for.

        What the op still owns afterwards (pins, pages not published) is for the caller to release.
        """
        op = verdict.op
        load = self._in_flight.pop(op.op_id, None)
        void = op.op_id in self._void
        self._void.discard(op.op_id)
        for index in sorted(verdict.failed):
            self._bad_block(op.blocks[index], verdict)
        promoted = {} if load is not None and load.in_dram else _brought_from_ssd(verdict)
        self._count_loaded(len(op.blocks) - len(verdict.failed), len(promoted))
        if promoted and not void:
            self._directory.commit_many(op.op_id, promoted, Tier.DRAM)
        if load is None:
            return ()
        state = load.state
        state.loading = None
        state.slot.op_ended(op.op_id, verdict.status)
        if verdict.status is not OpStatus.DONE:
            state.may_load = False
        if op.layerwise or verdict.status is not OpStatus.DONE:
            self.promoted(state)
        return (state,)

    def void_in_flight(self) -> None:
        """What is being loaded belongs to the time before a cache reset and must not be published in DRAM."""
        self._void.update(self._in_flight)

    def _count_loaded(self, blocks: int, from_ssd: int) -> None:
        """What arrived on every rank; that it was asked for is counted elsewhere."""
        if blocks > from_ssd:
            self._stats.count(_LOADED_BLOCKS["dram"], blocks - from_ssd)
        if from_ssd:
            self._stats.count(_LOADED_BLOCKS["ssd"], from_ssd)

    def _bad_block(self, block: BlockCopy, verdict: Verdict) -> None:
        for reason in verdict.reasons or ("unknown",):
            self._stats.add("vllm:umbp_failed_blocks", 1, "load", reason)
        if VERIFY_FAILED in verdict.reasons:
            self._directory.drop(block.key, Tier.SSD if block.ssd_slot >= 0 else Tier.DRAM)


def _brought_from_ssd(verdict: Verdict) -> dict[bytes, bytes]:
    """What is in DRAM now because it came through it: the checksums by key."""
    return {
        block.key: block.checksums
        for index, block in enumerate(verdict.op.blocks)
        if block.ssd_slot >= 0 and index not in verdict.failed
    }
