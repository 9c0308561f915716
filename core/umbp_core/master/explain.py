"""Why a hash can, or cannot, be used on a node: for people who wonder about a miss."""

from __future__ import annotations

from umbp_core.index import Explanation
from umbp_core.index_feed import Change
from umbp_core.master.model import HashChange, HashExplanation, NodeStatus
from umbp_core.tiers import Tier

_SENTENCES = {
    NodeStatus.UNKNOWN: "node {node} is not registered; nothing that it reports is kept",
    NodeStatus.EXPIRED: "node {node} expired: it was silent for too long",
}


def explain(node_id: str, status: NodeStatus, explanation: Explanation, now: float) -> HashExplanation:
    """Put the index's ``explanation`` of a hash on a node into words; the times become ages."""
    changes = tuple(
        HashChange(change.tier, change.kind.name.lower(), now - change.at, change.reason)
        for change in explanation.changes
    )
    tiers = tuple(explanation.tiers)
    return HashExplanation(node_id, status, tiers, changes, _sentence(node_id, status, explanation, now))


def _sentence(node_id: str, status: NodeStatus, explanation: Explanation, now: float) -> str:
    if explanation.tiers:
        return f"node {node_id} holds it on {', '.join(map(_name, explanation.tiers))}"
    parts = [_SENTENCES[status].format(node=node_id)] if status in _SENTENCES else []
    if explanation.changes:
        latest = max(explanation.changes, key=lambda change: change.seq)
        parts.append(f"{_what(latest)} {now - latest.at:.1f} s ago")
    else:
        parts.append(f"node {node_id} never reported it, or longer ago than the master remembers")
    return "; ".join(parts)


def _what(change: Change) -> str:
    reason = f" ({change.reason})" if change.reason else ""
    return f"{_name(change.tier)} was {change.kind.name.lower()}{reason}"


def _name(tier: int) -> str:
    return next((known.name for known in Tier if known == tier), f"tier {tier}")
