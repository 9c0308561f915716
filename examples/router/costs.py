"""The decision: what a prompt would cost on each worker, and which is the cheapest.  Pure; no I/O, no clock."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from umbp_core.index_match import TierRun
from umbp_core.tiers import Tier


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds that one token costs a worker.

    ``tiers``: to bring its KV from a tier of the worker itself.  ``prefill``: to compute it.  ``remote``: to fetch it
    from another worker; ``None`` where workers cannot.  ``stream``: what each answer that is being written adds to the
    wait of a new request.
    """

    prefill: float = 1e-4
    tiers: Mapping[int, float] = field(default_factory=lambda: {Tier.HBM: 0.0, Tier.DRAM: 1e-5, Tier.SSD: 5e-5})
    remote: float | None = None
    stream: float = 5e-3

    def weights(self, block_tokens: int) -> dict[int, float]:
        """The same per block, as a master's ``match_prefix`` wants it; tiers that are not named cannot be used."""
        return {int(tier): seconds * block_tokens for tier, seconds in self.tiers.items()}


@dataclass(frozen=True, slots=True)
class Offer:
    """What one seat (an engine, or one data-parallel rank of it) has for a prompt.

    ``runs`` is the prefix of the prompt that it holds, in blocks of ``block_tokens``.
    """

    seat: str
    speeds: Speeds
    queue_seconds: float = 0.0
    outstanding: int = 0
    runs: Sequence[TierRun] = ()
    block_tokens: int = 0

    @property
    def held_tokens(self) -> int:
        """Tokens of the prompt whose KV the seat holds."""
        return sum(run.length for run in self.runs) * self.block_tokens


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds until the first token, if a prompt went to ``offer``."""

    offer: Offer
    prompt_tokens: int
    load_seconds: float
    prefill_seconds: float
    remote_tokens: int = 0

    @property
    def work_seconds(self) -> float:
        """What the request itself takes."""
        return self.load_seconds + self.prefill_seconds

    @property
    def seconds(self) -> float:
        """With the wait for those before it."""
        return self.offer.queue_seconds + self.work_seconds


class Reason(enum.Enum):
    """Why a worker was chosen."""

    PREFIX = "prefix"
    """Nobody holds more of the prompt."""
    QUEUE = "queue"
    """Somebody holds more of it, but is too busy, or would take longer to load it."""
    LOAD = "load"
    """Nobody holds any of it, or nobody knows: the least busy one."""


@dataclass(frozen=True, slots=True)
class Decision:
    """All seats, the best first, and why the first is the first."""

    ranking: tuple[Estimate, ...]
    reason: Reason
    note: str = ""
    """What kept the router from knowing more; empty when nothing did."""

    def why(self, rank: int = 0) -> str:
        """One line for people and for a header: plain ASCII, no part of the prompt."""
        chosen = self.ranking[rank]
        parts = [self.reason.value if rank == 0 else f"retry {rank}", *([self.note] if self.note else [])]
        if chosen.offer.runs:
            held = " ".join(f"{run.length} {_name(run.tier)}" for run in chosen.offer.runs)
            parts.append(f"holds {chosen.offer.held_tokens} of {chosen.prompt_tokens} tokens (blocks: {held})")
        if chosen.remote_tokens:
            parts.append(f"{chosen.remote_tokens} tokens from others")
        parts.append(f"{chosen.seconds:.4f} s, of which queue {chosen.offer.queue_seconds:.4f} s")
        if rank + 1 < len(self.ranking):
            following = self.ranking[rank + 1]
            parts.append(f"next {following.offer.seat} {following.seconds:.4f} s")
        return "; ".join(parts)


def estimate(offer: Offer, prompt_tokens: int, held_elsewhere: int = 0) -> Estimate:
    """What ``prompt_tokens`` would cost on ``offer``; others hold the first ``held_elsewhere`` tokens of them.

    The last token is computed in any case.  Prefill is taken to be as long as its tokens are many, which flatters long
    prompts, on all workers alike.
    """
    speeds, block = offer.speeds, offer.block_tokens
    load = sum(speeds.tiers.get(run.tier, speeds.prefill) * run.length * block for run in offer.runs)
    missing = max(1, prompt_tokens - offer.held_tokens)
    remote = 0
    if speeds.remote is not None and speeds.remote < speeds.prefill:
        remote = max(0, min(missing - 1, held_elsewhere - offer.held_tokens))
        load += remote * speeds.remote
    return Estimate(offer, prompt_tokens, load, (missing - remote) * speeds.prefill, remote)


def on_all_ranks(runs: Sequence[TierRun], others: Sequence[int]) -> Sequence[TierRun]:
    """What all ranks of an engine can use of the first rank's ``runs``; the others hold ``others`` blocks each.

    What is on SSD lies in a storage of each rank's own.  What is in HBM or DRAM may lie in caches that the ranks have
    alike, of which only the first one tells; it counts.
    """
    if not others:
        return runs
    least, before, usable = min(others), 0, list[TierRun]()
    for run in runs:
        length = max(0, min(run.length, least - before)) if run.tier == Tier.SSD else run.length
        usable += [run._replace(length=length)] if length else []
        if length < run.length:
            break
        before += length
    return usable


def decide(offers: Sequence[Offer], prompt_tokens: int, note: str = "") -> Decision:
    """Rank ``offers``, of which there is at least one: by seconds, then by requests under way, then in their order.

    Give them in the order in which they should get equal work, such as the longest unused first.
    """
    longest = max(offer.held_tokens for offer in offers)
    ranking = sorted(
        (estimate(offer, prompt_tokens, longest) for offer in offers),
        key=lambda each: (each.seconds, each.offer.outstanding),
    )
    return Decision(tuple(ranking), _reason(ranking[0].offer.held_tokens, longest), note)


def _reason(held: int, longest: int) -> Reason:
    if longest == 0:
        return Reason.LOAD
    return Reason.PREFIX if held == longest else Reason.QUEUE


def _name(tier: int) -> str:
    return next((known.name for known in Tier if known == tier), f"tier {tier}")
