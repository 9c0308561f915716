"""What a master's service needs from outside, as Protocols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from umbp_core.master.model import ClientRecord, EvictionOrder, NodeInfo
from umbp_core.master.samples import MetricSample


class ClientStore(Protocol):
    """Keeps what a master has to know about its nodes after a restart.

    ``save`` and ``delete`` return at once, whatever the disk or the network does, and raise nothing; they are done in
    the order in which they were asked for.
    """

    def load(self) -> list[ClientRecord]:
        """What was saved.  Called once, before the master serves; may block."""
        ...

    def catch_up(self, take: Callable[[list[ClientRecord]], None]) -> None:
        """Give ``take`` what was saved, once, where :meth:`load` could not read it and that is possible now.

        Nothing is saved or deleted in the meantime, so that ``take`` can say first what the records are to become.
        """
        ...

    def save(self, record: ClientRecord) -> None:
        """Keep ``record`` instead of an earlier one of the node."""
        ...

    def delete(self, node_id: str) -> None:
        """Keep nothing of the node any more."""
        ...

    def close(self) -> None:
        """Finish what was asked for.  May block."""
        ...


class EvictionSender(Protocol):
    """Asks nodes to evict blocks."""

    async def send(self, order: EvictionOrder) -> None:
        """Ask ``order``'s node, with a deadline; a node that does not answer is not the caller's problem."""
        ...


class MasterObserver(Protocol):
    """Told what a master does; must neither raise nor block."""

    def reported(self, node: str, tier: int, blocks: int, accepted: bool) -> None:
        """A node reported external blocks; they were not ``accepted`` when it was not alive."""
        ...

    def revoked(self, node: str, tier: int | None, blocks: int | None) -> None:
        """A node revoked external blocks; without ``blocks`` all of the tier, and without ``tier`` all of the node."""
        ...

    def matched(self, queried: int, matched: int) -> None:
        """Somebody asked for so many hashes; ``matched`` is the sum of what each node holds of them."""
        ...

    def node_changed(self, info: NodeInfo) -> None:
        """A node registered, or came back after it had expired."""
        ...

    def node_gone(self, node_id: str) -> None:
        """A node unregistered or expired."""
        ...

    def heartbeat(self, node: str, events: int, gap: bool) -> None:
        """A heartbeat came with so many events; ``gap``: a full sync is asked for."""
        ...

    def routed(self, call: str, node: str, entries: int = 1) -> None:
        """So many blocks of a call of ``node`` were routed.

        ``call`` is ``route_put``, ``route_get``, ``batch_route_put``, ``batch_route_get`` or ``lookup``.
        """
        ...

    def metrics_reported(self, node: str, tags: Sequence[str], samples: Sequence[MetricSample]) -> None:
        """A node handed over metrics of its own; ``tags`` are those that it registered with."""
        ...

    def call_finished(self, protocol: str, call: str, code: str, seconds: float) -> None:
        """A door (``grpc`` or ``native``) answered a call."""
        ...
