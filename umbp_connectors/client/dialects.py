"""What the two kinds of master differ in, behind one face.

Our own takes numbered batches and says what it knows; any other takes plain calls and says nothing, so that what it is
told has to be repeated until it is answered, and told anew when it may have forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from umbp_core.index import ExternalKvIndex
from umbp_core.index_gate import Acknowledgement, ActionKind, Batch, Verdict
from umbp_core.index_match import PrefixMatch
from umbp_core.master.model import Registration, RegistrationAck
from umbp_core.master.transport import MasterTransport, NativeTransport, is_native


class Dialect(Protocol):
    """The calls in which masters differ.  Raises what ``MasterTransport`` raises."""

    transport: MasterTransport
    says_what_it_forgot: bool

    def take_over(self, registration: Registration, timeout: float) -> tuple[Registration, RegistrationAck]:
        """Register in place of a node that lives, and is taken for an earlier life of ours."""
        ...

    def deliver(self, node_id: str, batch: Batch, timeout: float) -> Acknowledgement:
        """Tell a batch; after a failure it may be told again."""
        ...

    def probe(self, node_id: str, incarnation: int, acked: int, timeout: float) -> Acknowledgement:
        """Whether what was acknowledged is still known, as far as the master can say."""
        ...

    def match_prefix(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None, timeout: float, limit: int = 0
    ) -> list[PrefixMatch]:
        """The longest usable prefix per node, of at most ``limit`` nodes; 0: of all."""
        ...


class NativeDialect:
    """Our own master."""

    says_what_it_forgot = True

    def __init__(self, transport: NativeTransport) -> None:
        self._native = transport
        self.transport: MasterTransport = transport

    def take_over(self, registration: Registration, timeout: float) -> tuple[Registration, RegistrationAck]:
        """With a larger incarnation than the one that lives."""
        known = self._native.probe(registration.node_id, registration.incarnation, 0, timeout)
        later = replace(registration, incarnation=max(registration.incarnation, known.incarnation) + 1)
        return later, self.transport.register(later, timeout)

    def deliver(self, node_id: str, batch: Batch, timeout: float) -> Acknowledgement:
        """In one call."""
        return self._native.apply_batch(node_id, batch, timeout)

    def probe(self, node_id: str, incarnation: int, acked: int, timeout: float) -> Acknowledgement:
        """In one call."""
        return self._native.probe(node_id, incarnation, acked, timeout)

    def match_prefix(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None, timeout: float, limit: int = 0
    ) -> list[PrefixMatch]:
        """In one call."""
        return self._native.match_prefix(hashes, weights, timeout, limit)


class PlainDialect:
    """Any master, by the calls of UMBP's wire."""

    says_what_it_forgot = False

    def __init__(self, transport: MasterTransport) -> None:
        self.transport = transport

    def take_over(self, registration: Registration, timeout: float) -> tuple[Registration, RegistrationAck]:
        """By unregistering the one that lives: it cannot be told that it is an earlier life."""
        self.transport.unregister(registration.node_id, timeout)
        return registration, self.transport.register(registration, timeout)

    def deliver(self, node_id: str, batch: Batch, timeout: float) -> Acknowledgement:
        """Action by action.  All of them may be repeated in this order without harm."""
        if batch.full_sync:
            self.transport.clear_node(node_id, timeout)
        for action in batch.actions:
            if action.kind is ActionKind.CLEAR:
                self.transport.clear_tier(node_id, action.tier, timeout)
            elif action.kind is ActionKind.REVOKE:
                self.transport.revoke(node_id, action.hashes, action.tier, timeout)
            elif not self.transport.report(node_id, action.hashes, action.tier, timeout):
                return Acknowledgement(Verdict.GAP, batch.incarnation, 0, request_full_sync=True)
        return Acknowledgement(Verdict.APPLY, batch.incarnation, batch.seq, request_full_sync=False)

    def probe(self, node_id: str, incarnation: int, acked: int, timeout: float) -> Acknowledgement:
        """It cannot say; nothing is asked."""
        return Acknowledgement(Verdict.REPLAY, incarnation, acked, request_full_sync=False)

    def match_prefix(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None, timeout: float, limit: int = 0
    ) -> list[PrefixMatch]:
        """Worked out here from a plain match."""
        index = ExternalKvIndex()
        for match in self.transport.match(hashes, False, timeout):
            for tier, held in match.tiers.items():
                index.report(match.node_id, held, tier)
        return index.match_prefix(hashes, weights)[: limit or None]


def dialect_of(transport: MasterTransport) -> Dialect:
    """The way to talk over ``transport``."""
    return NativeDialect(transport) if is_native(transport) else PlainDialect(transport)
