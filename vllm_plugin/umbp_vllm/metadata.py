"""What crosses between vLLM's scheduler process and its workers, and back.

Leader to worker: one :class:`StepMetadata` per engine step, drained exactly once, its size in
proportion to what changed.  Worker to leader: one :class:`WorkerReport`, merged over the ranks by
vLLM's own output aggregator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from umbp_core.ops import LeaderTransferRequest, NewWorkerSlot, OpResult
from umbp_vllm.compat import KVConnectorHandshakeMetadata, KVConnectorWorkerMetadata

PROTOCOL_VERSION = 5
"""Raised whenever the meaning of a field below changes; a leader refuses workers of another version."""


class RankHello(msgspec.Struct, frozen=True):
    """What one worker tells the leader once, before the first op.

    ``world_rank`` is ``pp_rank * tp_size + tp_rank``.  ``writer_rank`` is the world rank whose arena and
    slab this rank uses: its own, or the first TP rank's where all TP ranks hold the same KV.  Pages
    and slots are counted in objects; ``problem`` says why there are none although they were asked for.  ``prefix`` is
    what the rank's object keys begin with: written down for tools that verify what lies on SSD.
    ``arena`` names the daemon's memory that this rank has mapped; it is empty where there is none.  ``fitted``: what
    lay in its slab beyond the last slot that there is now has been moved (``RankSlab.fitted``).
    """

    version: int
    world_rank: int
    writer_rank: int
    identity: bytes
    layout: bytes
    page_bytes: int
    dram_pages: int
    ssd_slots: int
    slot_bytes: int
    object_bytes: tuple[int, ...]
    problem: str = ""
    prefix: bytes = b""
    arena: bytes = b""
    fitted: bool = False


@dataclass
class HandshakeHello(KVConnectorHandshakeMetadata):
    """The hello in the form that vLLM's handshake carries."""

    hello: RankHello


@dataclass
class StepMetadata(KVConnectorMetadata):
    """The leader's instructions for one engine step.

    ``iteration`` grows by exactly one per step.  ``ops`` start in this step at the earliest.  ``cancels``
    are op ids whose request is gone.  ``refused_loads`` are loads that vLLM waits for but that the
    leader could not plan: request id and the HBM blocks that therefore hold nothing.  ``fences`` are stores, sent
    earlier or now, that must have read their HBM blocks before this step writes any: the blocks may be somebody else's.
    ``layerwise`` are loads that start before this step's forward pass, which waits for their layers.  ``void_blocks``
    are HBM blocks that this step counts on and that no load fills.  ``new_slots`` are the requests that vLLM has wait
    until their loads have ended on every rank.  ``overdue`` are ops that were sent long ago; the leader has
    not heard how they ended, and asks every rank what it knows of them.  ``who`` asks for the hello (again).
    ``arena`` is the daemon's memory that the ops mean: a rank that has another one mapped, or none, refuses them and
    maps it.  ``until`` says, for loads of what was lent, until when (``time.monotonic`` of the host) what they bring
    counts.
    """

    iteration: int
    ops: list[LeaderTransferRequest] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    refused_loads: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    fences: list[str] = field(default_factory=list)
    layerwise: list[LeaderTransferRequest] = field(default_factory=list)
    void_blocks: list[int] = field(default_factory=list)
    new_slots: list[NewWorkerSlot] = field(default_factory=list)
    overdue: list[LeaderTransferRequest] = field(default_factory=list)
    who: bool = False
    arena: bytes = b""
    until: dict[str, float] = field(default_factory=dict)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Results, ops that left the quarantine, and hellos, by world rank.

    ``running`` are overdue ops that a rank works on or keeps apart; ``missed`` are the steps (first and last number)
    whose instructions never came: the rank carries nothing of them out, also if they come later.
    ``arenas`` says which of the daemon's arenas a rank has mapped from now on.
    """

    results: dict[int, list[OpResult]] = field(default_factory=dict)
    released: dict[int, list[str]] = field(default_factory=dict)
    hellos: dict[int, RankHello] = field(default_factory=dict)
    running: dict[int, list[str]] = field(default_factory=dict)
    missed: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    arenas: dict[int, bytes] = field(default_factory=dict)

    @property
    def ranks(self) -> set[int]:
        """The ranks that said something."""
        return {*self.results, *self.released, *self.hellos, *self.running, *self.missed, *self.arenas}

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """The report of both; called by vLLM once per further rank."""
        if not isinstance(other, WorkerReport):
            return self
        merged = WorkerReport(hellos={**self.hellos, **other.hellos}, arenas={**self.arenas, **other.arenas})
        for report in (self, other):
            for rank, results in report.results.items():
                merged.results.setdefault(rank, []).extend(results)
            for rank, released in report.released.items():
                merged.released.setdefault(rank, []).extend(released)
            for rank, running in report.running.items():
                merged.running.setdefault(rank, []).extend(running)
            for rank, missed in report.missed.items():
                merged.missed.setdefault(rank, []).extend(missed)
        return merged
