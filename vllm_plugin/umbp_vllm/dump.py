"""What the two halves are doing, as plain data for whoever looks for a hang.

Everything here only reads, and reads every mapping by one call that copies it, so that it also works from another
thread while the engine's own hangs (:mod:`umbp_connectors.debug.desk`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from umbp_core.slots import Slot, SlotTable
from umbp_core.tiers import Tier
from umbp_vllm.pool import LeaderPool
from umbp_vllm.requests import RequestState

Row = dict[str, object]


def leader_state(
    iteration: int, slots: SlotTable, requests: Mapping[str, RequestState], pool: LeaderPool | None, now: float
) -> Row:
    """The scheduler half: every request with its life, transaction, ops and pins; every op; every tier."""
    states = {state.slot.request_id: state for state in list(requests.values())}
    ops = {} if pool is None else {str(op["op"]): op for op in pool.ledger.dump(now)}
    rows = [_request(slot, states.get(slot.request_id), ops, now) for slot in list(slots)]
    whole: Row = {"step": iteration, "requests": rows}
    if pool is None:
        return {**whole, "pool": "not open: not all workers have said hello, or it was refused (see the log)"}
    return {**whole, **_pool(pool, now)}


def _request(slot: Slot, state: RequestState | None, ops: Mapping[str, Row], now: float) -> Row:
    """One request; ``state`` is missing where the engine has given its id to another one meanwhile."""
    mine = list(slot.ops.items())
    row: Row = {
        "slot": slot.request_id,
        "life": slot.life.name,
        "transaction": slot.transaction.name,
        "ops": [{"op": op_id, **_brief(direction.label, ops.get(op_id))} for op_id, direction in mine],
        "pins": 0,
    }
    if state is None:
        return row
    request, staged, loading = state.request, state.staged, ops.get(state.loading or "")
    row["computed_tokens"], row["tokens"] = request.num_computed_tokens, request.num_tokens
    row["pins"] = staged.blocks if staged is not None else loading["blocks"] if loading is not None else 0
    row["waits_for"] = _waits(state, now)
    return row


def _brief(direction: str, op: Row | None) -> Row:
    """An op in the row of its request; ``op`` is missing where it ended while this was read."""
    return {"direction": direction, "age_s": None if op is None else op.get("age_s")}


def _waits(state: RequestState, now: float) -> str:
    """What the request waits for, as far as the pool knows."""
    if state.staged is not None:
        return f"a match of {state.promised} tokens, {now - state.staged.since:.3f} s old, for its allocation"
    if state.loading is not None:
        return f"its load {state.loading}"
    if state.asked_since is not None:
        return f"another request's load or the workers, for {now - state.asked_since:.3f} s"
    return ""


def _pool(pool: LeaderPool, now: float) -> Row:
    tiers = [Tier.DRAM] if pool.catalogue is None else [Tier.DRAM, Tier.SSD]
    return {
        "ops": pool.ledger.dump(now),
        "tiers": [_tier(pool, tier) for tier in tiers],
        "staged_matches": pool.loads.staged,
        "held_ops": len(pool.held),
        "demotions_waiting": 0 if pool.demotions is None else len(pool.demotions),
    }


def _tier(pool: LeaderPool, tier: Tier) -> Row:
    stats = pool.directory.stats(tier)
    return {
        "tier": tier.name,
        "objects": stats.objects,
        "pinned": stats.pinned,
        "reserved": stats.reserved,
        "free_pages": stats.free_pages,
        "pages": stats.total_pages,
    }


def worker_state(ops: Iterable[Mapping[str, object]], quarantined: Iterable[str], **counts: int) -> Row:
    """One rank's half: its transfer engine's ops with their phases, and what it still has to tell."""
    return {**counts, "ops": [dict(op) for op in ops], "quarantined": sorted(quarantined)}
