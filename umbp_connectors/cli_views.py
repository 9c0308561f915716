"""What a master says, as tables for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from umbp_connectors.cli_tables import table
from umbp_core.index_match import PrefixMatch
from umbp_core.master.model import ExternalMatch, HashExplanation, NodeInfo, NodeStatus
from umbp_core.tiers import Tier

_NAMES = {int(tier): tier.name for tier in Tier}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STATUS_STYLES = {NodeStatus.ALIVE: "green", NodeStatus.EXPIRED: "red", NodeStatus.UNKNOWN: "yellow"}
_MISSING = "-"


def tier_name(tier: int) -> str:
    """The name of a tier, or its number."""
    return _NAMES.get(tier, str(tier))


def text_of(data: bytes) -> str:
    """A hash as its engine publishes it; bytes that are no text with escapes."""
    return data.decode("utf-8", errors="backslashreplace")


def node_values(info: NodeInfo) -> dict[str, Any]:
    """One node for programs: sizes in bytes, tiers by name."""
    return {
        "node": info.node_id,
        "status": info.status.name.lower(),
        "peer_address": info.peer_address,
        "node_address": info.node_address,
        "tags": list(info.tags),
        "incarnation": info.incarnation,
        "last_heartbeat_age_s": round(info.last_heartbeat_age, 3),
        "capacities": {
            tier_name(tier): {"total": total, "available": available} for tier, total, available in info.capacities
        },
        "blocks": by_name(info.block_counts),
        "external": by_name(info.external_counts),
    }


def by_name(counts: Mapping[int, int]) -> dict[str, int]:
    """Counts by the names of their tiers."""
    return {tier_name(tier): count for tier, count in sorted(counts.items())}


def node_table(infos: Sequence[NodeInfo], rates: Mapping[str, float] | None = None) -> Table:
    """All nodes; with ``rates`` also how their numbers of hashes change per second."""
    columns = ["node", "status", "peer", "heard", "capacity", "blocks", "external"]
    shown = table(*columns, *(["change/s"] if rates is not None else []), "tags")
    for info in infos:
        row = [
            escape(info.node_id),
            f"[{_STATUS_STYLES[info.status]}]{info.status.name.lower()}[/]",
            escape(info.peer_address) or _MISSING,
            f"{info.last_heartbeat_age:.1f} s",
            _capacities(info),
            _counts(info.block_counts),
            _counts(info.external_counts),
        ]
        if rates is not None:
            row.append(f"{rates.get(info.node_id, 0.0):+,.0f}")
        shown.add_row(*row, escape(" ".join(info.tags)))
    return shown


def match_values(match: ExternalMatch) -> dict[str, Any]:
    """One node's part of a match for programs."""
    return {
        "node": match.node_id,
        "peer_address": match.peer_address,
        "matched": match.matched_hash_count(),
        "tiers": {tier_name(tier): [text_of(key) for key in keys] for tier, keys in match.tiers.items()},
    }


def match_table(matches: Sequence[ExternalMatch], asked: int) -> Table:
    """Who holds how many of ``asked`` hashes."""
    shown = table("node", "peer", "matched", "by tier")
    for match in sorted(matches, key=lambda m: (-m.matched_hash_count(), m.node_id)):
        counts = {tier: len(keys) for tier, keys in match.tiers.items()}
        matched = f"{match.matched_hash_count()} of {asked}"
        shown.add_row(escape(match.node_id), escape(match.peer_address) or _MISSING, matched, _counts(counts))
    return shown


def prefix_values(match: PrefixMatch) -> dict[str, Any]:
    """One node's prefix for programs."""
    runs = [{"tier": tier_name(run.tier), "blocks": run.length} for run in match.runs]
    return {"node": match.node, "length": match.length, "runs": runs, "cost": match.cost}


def prefix_table(matches: Sequence[PrefixMatch], asked: int) -> Table:
    """How long a prefix of ``asked`` blocks each node has, the longest first."""
    shown = table("node", "prefix", "runs")
    for match in matches:
        runs = ", ".join(f"{run.length} {tier_name(run.tier)}" for run in match.runs)
        shown.add_row(escape(match.node), f"{match.length} of {asked}", runs)
    return shown


def hit_table(counts: Sequence[tuple[bytes, int]]) -> Table:
    """Hit counters."""
    shown = table("hash", "hits")
    for key, count in counts:
        shown.add_row(escape(text_of(key)), f"{count:,}")
    return shown


def explanation_values(key: bytes, explanation: HashExplanation) -> dict[str, Any]:
    """Why a hash can, or cannot, be used, for programs."""
    changes = [
        {"tier": tier_name(c.tier), "kind": c.kind, "age_s": round(c.age, 3), "reason": c.reason}
        for c in explanation.changes
    ]
    return {
        "hash": text_of(key),
        "node": explanation.node_id,
        "status": explanation.status.name.lower(),
        "tiers": [tier_name(tier) for tier in explanation.tiers],
        "changes": changes,
        "text": explanation.text,
    }


def size_text(nbytes: float) -> str:
    """Bytes for people."""
    for unit in _UNITS:
        if nbytes < 1024 or unit == _UNITS[-1]:
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def _capacities(info: NodeInfo) -> str:
    used = [
        f"{tier_name(tier)} {size_text(total - available)} of {size_text(total)}"
        for tier, total, available in sorted(info.capacities)
    ]
    return "\n".join(used) or _MISSING


def _counts(counts: Mapping[int, int]) -> str:
    return "\n".join(f"{name} {count:,}" for name, count in by_name(counts).items() if count) or _MISSING
