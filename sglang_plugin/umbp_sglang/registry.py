"""The pools that SGLang registered: made from its host pools, opened together, each with its part of the space."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.making import pool_maker
from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.local import LocalPool, LocalPoolConfig
from umbp_connectors.pool.settings import local_pool_config
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_core.errors import ConfigError, StateError, UmbpError
from umbp_core.ids import Identity
from umbp_sglang import compat
from umbp_sglang.host_pages import PageAccess, is_logical, layout_of, page_access
from umbp_sglang.identity import layout_descriptor, pool_identity, rank_scope
from umbp_sglang.keys import block_keys
from umbp_sglang.pool_teller import WHOLE_POOLS, PoolTeller
from umbp_sglang.pools import Budget, StorePool
from umbp_sglang.settings import RankFacts, StoreSettings
from umbp_sglang.siblings import SiblingPool, SiblingServer, meeting_place

logger = logging.getLogger(__name__)

KV = "kv"
_STATES = "mamba"
"""SGLang's pool of states: every TP rank has its own part of them, even where KV is the same on all."""

PoolMaker = Callable[[Identity, LocalPoolConfig], LocalPool | DaemonPool]


@dataclass(frozen=True, slots=True)
class _Member:
    """A pool that SGLang registered."""

    name: str
    host_pool: Any
    access: PageAccess
    replicated: bool
    cut: bool = False
    """Whether its pages are cut into ranges of heads, which other TP sizes have too."""

    @property
    def nbytes(self) -> int:
        """What SGLang's host pool takes: how SGLang itself divided the memory."""
        return self.access.page_count * self.access.object_bytes * self.access.parts


class PoolRegistry:
    """SGLang's pools by name.  Added by the scheduler; read by any thread.

    They are opened together, when SGLang has registered all that it has, or at the first use: only then is known how
    much each needs.  Each gets of DRAM and SSD what SGLang gave its host pool of host memory, in proportion.
    """

    def __init__(self, settings: StoreSettings, weights: object = None, make_pool: PoolMaker | None = None) -> None:
        self._settings = settings
        self._teller: PoolTeller | None = None
        self._weights = weights
        self._make_pool = make_pool or pool_maker(settings.config)
        self._in_daemon = settings.config.mode == "daemon"
        self._lock = threading.RLock()
        self._added: dict[str, _Member] = {}
        self._known: dict[str, _Member] = {}
        self._open: dict[str, StorePool] = {}
        self._closed = False
        self.anchor: Any = None
        """The host pool of KV; it may have no bytes (see :attr:`logical`)."""

    @property
    def logical(self) -> bool:
        """Whether the KV pool only counts pages: then the side pools have all the bytes."""
        return self.anchor is not None and is_logical(self.anchor)

    def bind_anchor(self, host_pool: Any) -> None:
        """Take the KV pool.  Raises ``ConfigError`` when its pages cannot be stored with these settings."""
        if host_pool is self.anchor:
            return
        if not is_logical(host_pool):
            member = self._member(KV, host_pool)
            if self._dram(member, 1.0) < round_up(member.access.object_bytes, ALIGNMENT):
                raise ConfigError(
                    f"a DRAM tier of {self._dram(member, 1.0)} bytes for each rank does not hold one page of "
                    f"{member.access.object_bytes} bytes; set a larger dram_capacity"
                )
            with self._lock:
                self._added[KV] = member
        self.anchor = host_pool

    def tell(self, teller: PoolTeller) -> None:
        """Let ``teller`` know what the pools hold.  Before they are opened."""
        self._teller = teller

    def add(self, name: str, host_pool: Any) -> None:
        """Take a side pool, or KV again.  Raises ``ConfigError`` when its pages cannot be stored.

        A side pool may have its pages in the host pool of KV; its objects are its own all the same.
        """
        if (name == KV and host_pool is self.anchor) or is_logical(host_pool):
            return
        member = self._member(name, host_pool)
        with self._lock:
            if name not in self._known:
                self._added[name] = member

    def get(self, name: str) -> StorePool | None:
        """The pool, open; ``None`` when there is none of that name or it cannot be used."""
        if self._added:
            self.open()
        return self._open.get(name)

    def open(self) -> None:
        """Open what was added.  A pool that cannot be opened is left out, which costs hits and one warning.

        A pool that comes when others are open has them opened anew, so that all of them together stay within the
        configured space: what they had in DRAM only is gone.
        """
        with self._lock:
            added, self._added = self._added, {}
            if self._closed or not added:
                return
            self._known.update(added)
            self._close_pools()
            total = sum(member.nbytes for member in self._known.values())
            told = self._begin_to_tell(self._known.values())
            for member in self._known.values():
                try:
                    pool = self._pool(member, member.nbytes / total)
                    self._observe(pool, told)
                    pool.open()
                except UmbpError as error:
                    logger.warning("umbp: SGLang's pool %s is not stored: %s", member.name, error)
                    continue
                self._open[member.name] = pool

    def whole_prefix(self, keys: Sequence[str], anchor: int, budget: Budget) -> int:
        """Of the first ``anchor`` pages of ``keys``, how many are in all the side pools that SGLang reads whole."""
        pools = [pool for name in WHOLE_POOLS if name != KV and (pool := self.get(name)) is not None]
        chain = block_keys(keys[:anchor]) if pools else []
        for pool in pools:
            anchor = min(anchor, pool.count_prefix(chain[:anchor], budget))
        return anchor

    def pools(self) -> list[StorePool]:
        """Every open pool."""
        return list(self._open.values())

    @property
    def page_tokens(self) -> int:
        """Tokens of one page; 0 before the KV pool is known."""
        return int(compat.optional(self.anchor, "page_size", 0))

    def tiers(self) -> dict[str, tuple[int, int]]:
        """Of each tier how many bytes of it the pools of this rank use and have."""
        total: dict[str, tuple[int, int]] = {}
        for pool in self.pools():
            with contextlib.suppress(StateError):  # it is being closed
                for tier, (used, there) in pool.tiers().items():
                    before = total.get(tier, (0, 0))
                    total[tier] = (before[0] + used, before[1] + there)
        return total

    def call_observers(self) -> None:
        """Have the pages of KV told that were not, though nothing changed."""
        pool = self._open.get(KV)
        for shard in pool.shards if pool is not None else ():
            if isinstance(shard, LocalPool | DaemonPool):
                shard.call_observer()

    def clear(self) -> None:
        """Forget every page of every pool, also of those that nobody has used yet.

        Raises what a pool raises that cannot forget its pages now; others may have forgotten theirs.
        """
        self.open()
        for pool in self.pools():
            pool.clear()

    def close(self) -> None:
        """Close every pool; idempotent."""
        with self._lock:
            self._closed = True
            self._close_pools()

    def _close_pools(self) -> None:
        pools, self._open = self._open, {}
        self._begin_to_tell(())
        with contextlib.ExitStack() as closing:
            for pool in pools.values():
                closing.callback(pool.close)

    def _begin_to_tell(self, members: Iterable[_Member]) -> list[tuple[str, int]]:
        """Void what was told of earlier pools; which parts of which of these are to tell what they hold."""
        if self._teller is None:
            return []
        return self._teller.begin({each.name: each.access.parts for each in members if not self._is_read_only(each)})

    def _observe(self, pool: StorePool, told: Sequence[tuple[str, int]]) -> None:
        for number, (name, part) in enumerate(told):
            shard = pool.shards[part] if name == pool.name else None
            if self._teller is not None and isinstance(shard, LocalPool | DaemonPool):
                shard.observe(self._teller.observer(number))

    def _is_read_only(self, member: _Member) -> bool:
        """Whether a sibling rank keeps the pool, and this one reads it there."""
        rank = self._settings.rank
        return member.replicated and rank.tp_size > 1 and not rank.writer and not self._in_daemon

    def _member(self, name: str, host_pool: Any) -> _Member:
        rank = self._settings.rank
        heads = name == KV or compat.has_heads(host_pool)
        cut = rank.head_parts > 0 and heads and layout_of(host_pool) == "page_head"
        try:
            access = self._cut_access(name, host_pool) if cut else None
            cut = access is not None
            access = access or page_access(host_pool)
        except ValueError as error:
            raise ConfigError(f"SGLang's pool {name} cannot be stored: {error}") from error
        # A draft model may have heads, which the ranks divide, beside a model whose KV is the same on all of them.
        own = name == _STATES or (name != KV and heads)
        return _Member(name, host_pool, access, rank.replicated and not own, cut)

    def _cut_access(self, name: str, host_pool: Any) -> PageAccess | None:
        """The pages of a pool of heads in ranges of them; ``None`` where a side pool's cannot be cut."""
        rank = self._settings.rank
        try:
            return page_access(host_pool, rank.head_parts // rank.tp_size)
        except ValueError as error:
            if name == KV:
                raise
            logger.info(
                "umbp: SGLang's pool %s is stored whole, so that other TP sizes do not share it: %s", name, error
            )
            return None

    def _pool(self, member: _Member, share: float) -> StorePool:
        parts: list[int | None] = [None]
        rank = self._settings.rank
        if member.cut:
            first = rank.tp_rank * member.access.parts
            parts = list(range(first, first + member.access.parts))
        identities = [self._identity(member, part) for part in parts]
        shared = self._is_shared(member)
        if self._is_read_only(member):
            timeout = self._settings.config.call_timeout_ms / 1000
            readers = [SiblingPool(found, meeting_place(found, rank.dp_rank), timeout) for found in identities]
            return StorePool(member.name, member.access, readers)
        pools = [
            self._make_pool(identity, self._config(identity, member, part, share))
            for identity, part in zip(identities, parts, strict=True)
        ]
        servers = [
            SiblingServer(pool, meeting_place(pool.identity, rank.dp_rank))
            for pool in pools
            if shared and isinstance(pool, LocalPool)
        ]
        return StorePool(member.name, member.access, pools, servers)

    def _identity(self, member: _Member, part: int | None) -> Identity:
        rank, pool, access = self._settings.rank, member.host_pool, member.access
        layout = layout_descriptor(
            kind=type(pool).__name__,
            layout=layout_of(pool),
            dtype=str(compat.optional(pool, "dtype", "")).removeprefix("torch."),
            page_tokens=access.rows,
            segments=access.segments,
            layers=int(compat.optional(pool, "layer_num") or 0),
            heads=int(compat.optional(pool, "head_num") or 0) // access.parts,
            head_dim=int(compat.optional(pool, "head_dim") or 0),
            access=access.name,
            stage=self._stage(pool),
        )
        scope = rank_scope(rank, member.replicated, part)
        return pool_identity(rank, self._settings.config.namespace, member.name, layout, scope, self._weights)

    def _stage(self, host_pool: Any) -> object:
        """Which layers this pipeline stage has; ``None`` where there is only one stage.

        Not every pool counts its layers from the model's first one, hence also how SGLang was told to divide them.
        """
        if self._settings.rank.pp_size == 1:
            return None
        ends = ("start_layer", "end_layer")
        spans = [[int(compat.optional(pool, end) or 0) for end in ends] for pool in (self.anchor, host_pool)]
        return {"spans": spans, "split": self._settings.rank.layer_split}

    def _config(self, identity: Identity, member: _Member, part: int | None, share: float) -> LocalPoolConfig:
        config, rank = self._settings.config, self._settings.rank
        columns, column = self._columns(member)
        if part is not None:
            columns, column = rank.head_parts, part
        groups = rank.pp_size * rank.cp_size
        return local_pool_config(
            config,
            object_bytes=member.access.object_bytes,
            dram_bytes=self._dram(member, share),
            eviction=self._settings.make_eviction,
            make_ssd_gate=self._settings.make_ssd_gate,
            rank=(rank.pp_rank * rank.cp_size + rank.cp_rank) * columns + column,
            ranks=groups * columns,
            ssd_share=share,
            engines=rank.dp_size,
            ssd_namespace=_folder(identity.namespace, rank),
            make_ssd=self._settings.make_ssd,
            shared_memory=self._is_shared(member),
        )

    def _is_shared(self, member: _Member) -> bool:
        """Whether one rank stores what all of them have, and the others read it in place."""
        return member.replicated and self._settings.rank.tp_size > 1 and not self._in_daemon

    def _columns(self, member: _Member) -> tuple[int, int]:
        """How many TP ranks have a part of their own of the pool, and which is this one's."""
        rank = self._settings.rank
        return (1, 0) if member.replicated else (rank.tp_size, rank.tp_rank)

    def _dram(self, member: _Member, share: float) -> int:
        """DRAM for one shard of ``member``, when this pool gets ``share`` of all."""
        rank = self._settings.rank
        holders = self._columns(member)[0] * rank.pp_size * rank.cp_size * member.access.parts
        return int(self._settings.config.dram_capacity * share) // holders


def _folder(namespace: str, rank: RankFacts) -> str:
    """The name of the pool's folder below the SSD folder: data-parallel ranks have one each."""
    return namespace if rank.dp_size == 1 else f"{namespace}-dp{rank.dp_rank}of{rank.dp_size}"
