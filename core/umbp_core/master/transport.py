"""How a master is talked to, as Protocols; there is one implementation per wire.

A transport stands for a connection to one master, made by somebody who completed the handshake.  It knows nothing of
retries, registrations or what a failure means: that is the matter of ``umbp_connectors.client``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypeGuard

from umbp_core.index_gate import Acknowledgement, Batch
from umbp_core.index_match import PrefixMatch
from umbp_core.master.model import (
    BlockPage,
    ExternalMatch,
    GetRoute,
    HashExplanation,
    Heartbeat,
    HeartbeatReply,
    NodeInfo,
    PutRoute,
    Registration,
    RegistrationAck,
)
from umbp_core.master.samples import MetricSample


class MasterTransport(Protocol):
    """The calls that every master answers.

    Every call blocks, for ``timeout`` seconds at most, and may be made by any thread.  It raises nothing but kinds of
    ``MasterError``: ``MasterUnavailable`` when there was no answer in time or the connection is gone (whether the call
    took effect is not known then), ``ProtocolError`` when the answer was not understood (the transport is of no use any
    more), and what the master says otherwise.  Hashes and keys are bytes; tiers are any ``int``, as on the wire.
    """

    @property
    def native(self) -> bool:
        """Whether this is a :class:`NativeTransport`."""
        ...

    def register(self, registration: Registration, timeout: float) -> RegistrationAck:
        """Introduce a node.  ``AlreadyRegistered`` when one of this name lives and is not superseded."""
        ...

    def unregister(self, node_id: str, timeout: float) -> None:
        """Forget a node and all that it said; nothing happens when it is not known."""
        ...

    def heartbeat(self, heartbeat: Heartbeat, timeout: float) -> HeartbeatReply:
        """Tell that a node lives, and what changed of its own blocks."""
        ...

    def route_put(
        self, node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str], timeout: float
    ) -> list[PutRoute]:
        """Where ``node_id`` should put blocks of these sizes; one answer per key."""
        ...

    def route_get(
        self, node_id: str, keys: Sequence[bytes], exclude: Collection[str], timeout: float
    ) -> list[GetRoute | None]:
        """Where ``node_id`` should get blocks from; one answer per key, ``None`` where nobody has it."""
        ...

    def lookup(self, keys: Sequence[bytes], timeout: float) -> list[bool]:
        """Whether anybody holds these blocks; no side effects."""
        ...

    def report(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> bool:
        """Add ``tier`` to what is known of ``hashes`` at ``node_id``.

        False when the master says that the node does not live, and that it therefore stored nothing.  UMBP's wire has
        no such answer: there it is always true.
        """
        ...

    def revoke(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> None:
        """Take ``tier`` away from what is known of ``hashes`` at ``node_id``."""
        ...

    def clear_tier(self, node_id: str, tier: int, timeout: float) -> None:
        """Take ``tier`` away from all hashes of ``node_id``."""
        ...

    def clear_node(self, node_id: str, timeout: float) -> None:
        """Forget all hashes of ``node_id``; it stays registered."""
        ...

    def match(self, hashes: Sequence[bytes], count_as_hit: bool, timeout: float) -> list[ExternalMatch]:
        """Who holds which of ``hashes``; each bucket in the order of the query."""
        ...

    def hit_counts(self, hashes: Sequence[bytes], timeout: float) -> list[tuple[bytes, int]]:
        """The hit counters of ``hashes``, without those that have none and without duplicates."""
        ...

    def report_metrics(self, node_id: str, samples: Sequence[MetricSample], timeout: float) -> None:
        """Hand over metrics of a node."""
        ...

    def close(self) -> None:
        """End the connection.  Idempotent, does not wait, and any thread may call it.

        Calls that are under way in other threads end soon with ``MasterUnavailable``.
        """
        ...


class NativeTransport(MasterTransport, Protocol):
    """The calls that only our own master answers."""

    def apply_batch(self, node_id: str, batch: Batch, timeout: float) -> Acknowledgement:
        """Apply a numbered batch of reports wholly or not at all, see ``BatchApplier``."""
        ...

    def probe(self, node_id: str, incarnation: int, acked: int, timeout: float) -> Acknowledgement:
        """Ask whether what was acknowledged up to ``acked`` is still known."""
        ...

    def match_prefix(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None, timeout: float, limit: int = 0
    ) -> list[PrefixMatch]:
        """The longest usable prefix of ``hashes`` per node, longest first; see ``ExternalKvIndex.match_prefix``.

        At most ``limit`` nodes; 0: all.
        """
        ...

    def list_nodes(self, timeout: float) -> list[NodeInfo]:
        """All nodes that the master knows."""
        ...

    def list_blocks(self, node_id: str, tier: int, cursor: int, limit: int, timeout: float) -> BlockPage:
        """Some of the hashes of a node on a tier; ``cursor`` is 0 at first, then that of the last page."""
        ...

    def explain(self, node_id: str, key: bytes, timeout: float) -> HashExplanation:
        """Why a hash can, or cannot, be used on a node."""
        ...


def is_native(transport: MasterTransport) -> TypeGuard[NativeTransport]:
    """Whether ``transport`` has the calls of our own master."""
    return transport.native
