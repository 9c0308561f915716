"""The hooks of umbp-connectors: where others may put their parts in, and where they are told what happened.

A plug-in is a module or an object with functions marked ``@hookimpl``, named by an entry point of the group
``umbp``.  It implements the hooks that it needs, with as many of their arguments as it needs.  The built-in
parts are registered through the same door (:mod:`umbp_connectors.builtin`) and asked last.

No hook is called per token or per block hash.  What a hook may do wrong stops at its caller: an exception
is logged once per plug-in and hook, counted, and never reaches an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pluggy

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.offload import GateMaker
from umbp_connectors.tier_ports import DramTier, PoolClient, SsdTier
from umbp_core.eviction import EvictionPolicy, LruPolicy
from umbp_core.ids import Identity
from umbp_core.offload import OffloadPolicy
from umbp_core.scheduler import Limits, TransferScheduler
from umbp_core.tiers import Tier

PROJECT_NAME = "umbp"
hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@dataclass(frozen=True, slots=True)
class DramTierSpec:
    """A DRAM tier that is wanted: ``pages`` pages for objects and ``staging_pages`` for bytes on their way."""

    page_bytes: int
    pages: int
    staging_pages: int = 0


@dataclass(frozen=True, slots=True)
class SsdTierSpec:
    """An SSD tier that is wanted: slots of ``slot_bytes`` (a multiple of 4096), as many as the capacity allows.

    ``namespace`` and ``layout`` (SHA-256) say whose objects they are; bytes of others must not be touched beyond what
    the capacity asks for.  ``rank`` is the world rank, ``ranks`` how many share ``config.ssd_capacity``, of which
    an engine of a data-parallel group gets its part: one of ``engines``.  An engine with several namespaces gives each
    a ``share`` of its part.

    The catalogue that says what lies in which slot is the caller's and lies below ``config.ssd_dir``, whatever holds
    the slots: one for all ranks, or with ``own_catalogue`` one for this rank.  A place that is in use gets
    ``patience_s`` seconds to become free.
    """

    namespace: str
    layout: bytes
    slot_bytes: int
    rank: int = 0
    ranks: int = 1
    engines: int = 1
    own_catalogue: bool = False
    share: float = 1.0
    patience_s: float = 5.0


@dataclass(frozen=True, slots=True)
class ClientSpec:
    """A client that is wanted: for objects of at most ``object_bytes`` under ``identity``.

    ``rank`` is the world rank, ``ranks`` how many share the configured capacities.  The plug-in host fills in
    ``make_eviction``, which makes a fresh policy of the configured name, ``make_ssd``, which opens the tier below
    DRAM, and ``make_ssd_gate``, which makes the gate before it, all whichever plug-in offers them; without ``make_ssd``
    it is a slab file, without ``make_ssd_gate`` everything may go there.
    """

    identity: Identity
    object_bytes: int
    rank: int = 0
    ranks: int = 1
    make_eviction: Callable[[], EvictionPolicy] = LruPolicy
    make_ssd: Callable[[SsdTierSpec], SsdTier] | None = None
    make_ssd_gate: GateMaker | None = None


@dataclass(frozen=True, slots=True)
class OffloadSpec:
    """An offload policy that is wanted: for blocks that could go from ``source`` to ``target``.

    ``present`` says for each of some keys whether the pool has it where copying it to ``target`` would gain nothing:
    in ``target``, and for DRAM also on SSD.  What ``target`` has or is getting is never asked about.
    """

    source: Tier
    target: Tier
    present: Callable[[Sequence[bytes]], Sequence[bool]]


@hookspec(firstresult=True)
def umbp_make_tier(config: UmbpConfig, spec: DramTierSpec | SsdTierSpec) -> DramTier | SsdTier | None:
    """Make the memory or the file behind one tier of one rank.

    Called: once per rank and tier, when an engine has told its KV layout.
    Returns: an open tier of the kind that ``spec`` asks for (``DramTier`` or ``SsdTier`` in
    ``umbp_connectors.tier_ports``), which the caller closes; ``None`` leaves it to the next plug-in.
    Thread & process: main thread of the rank's worker process.
    Failure: an ``UmbpError`` means that the tier cannot be had and ends the search: without DRAM the start stops,
    without SSD the service goes on.  Anything else counts as ``None``.
    """


@hookspec(firstresult=True)
def umbp_make_client(config: UmbpConfig, spec: ClientSpec) -> PoolClient | None:
    """Make a client of the pool, for put, get and exists with batches of objects that are given as buffers.

    Called: once per process that uses the pool without an engine's leader (benchmarks, tools, storage backends).
    Returns: an open client for ``config.mode``, which the caller closes; ``None`` leaves it to the next plug-in.
    Thread & process: the caller's.
    Failure: an ``UmbpError`` reaches the caller with its message.  Anything else counts as ``None``.
    """


@hookspec(firstresult=True)
def umbp_make_eviction(config: UmbpConfig, name: str) -> EvictionPolicy | None:
    """Make the policy that orders the objects of one tier for eviction.

    Called: once per tier, when the directory is built.
    Returns: a fresh policy when ``name`` (the key ``eviction_policy``) is one that this plug-in offers, else ``None``.
    Thread & process: scheduler process of the engine; the policy is used by one thread.
    Failure: an ``UmbpError`` stops the start with its message.  Anything else counts as ``None``.
    """


@hookspec(firstresult=True)
def umbp_make_offload_policy(config: UmbpConfig, name: str, spec: OffloadSpec) -> OffloadPolicy | None:
    """Make a policy that says which blocks may go from one tier to a slower one.

    Called: once per edge between tiers and name in ``dram_offload_policy`` or ``ssd_offload_policy``, when the pool is
    opened, and once before that to see whether somebody offers the name.
    Returns: a fresh policy (``umbp_core.offload.OffloadPolicy``) when this plug-in offers ``name``, else ``None``.
    Thread & process: process that decides what is copied; the policy is used by one thread at a time, must not block,
    and is asked with all the blocks of a request or an op at once.
    Failure: an ``UmbpError`` stops the start with its message.  Anything else counts as ``None``.  A policy that fails
    later admits every block; that is logged once and counted.
    """


@hookspec(firstresult=True)
def umbp_make_scheduler(config: UmbpConfig, limits: Limits) -> TransferScheduler | None:
    """Make the scheduler that decides which transfer of one rank may start, and when.

    Called: once per rank, when its transfer engine is built.
    Returns: a fresh scheduler with the behaviour of ``umbp_core.scheduler.TransferScheduler``, or ``None``.
    Thread & process: rank's worker process; the transfer engine guards it by a lock.
    Failure: an ``UmbpError`` stops the start of the rank's pool.  Anything else counts as ``None``.
    """


@hookspec
def umbp_op_finished(direction: str, status: str, nbytes: int, seconds: float, reason: str) -> None:
    """A transfer has ended on one rank.

    Called: once per op and rank.  ``direction`` is load, store or demote; ``status`` done, failed, cancelled or
    expired; ``reason`` a short label, empty when done.
    Returns: nothing.
    Thread & process: any thread of the rank's worker process; must not block.
    Failure: logged once, counted, otherwise without effect.
    """


@hookspec
def umbp_blocks_reported(tier: Tier, keys: Sequence[bytes]) -> None:
    """Blocks can be loaded from ``tier`` from now on.

    Called: once per tier and scheduling step in which anything changed.
    Returns: nothing.
    Thread & process: scheduler thread of the engine's scheduler process; must not block.
    Failure: logged once, counted, otherwise without effect.
    """


@hookspec
def umbp_blocks_revoked(tier: Tier, keys: Sequence[bytes]) -> None:
    """Blocks cannot be loaded from ``tier`` any more: evicted, dropped or cleared.

    Called: once per tier and scheduling step in which anything changed, before that step's reported blocks.
    Returns: nothing.
    Thread & process: scheduler thread of the engine's scheduler process; must not block.
    Failure: logged once, counted, otherwise without effect.
    """


@hookspec
def umbp_degraded(what: str, reason: str) -> None:
    """A part of the pool is not used any more; the service goes on without it.

    Called: once per part.  ``what`` names it (a tier, sharing, the catalogue), ``reason`` is one sentence.
    Returns: nothing.
    Thread & process: any; must not block.
    Failure: logged once, counted, otherwise without effect.
    """
