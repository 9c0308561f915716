"""What both halves of an engine say to the host's daemon at the start, made from the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from umbp_connectors.config import UmbpConfig
from umbp_connectors.daemon.doors import Door, is_missing
from umbp_connectors.daemon.follower import PoolFollower
from umbp_connectors.daemon.launch import Launcher
from umbp_connectors.daemon.pages import PageClient, RankArena, WantedPages, engine_token
from umbp_connectors.daemon.settings import door_of, socket_path
from umbp_connectors.plugins import PluginHost
from umbp_connectors.pool.books import PoolObserver
from umbp_core.ids import Identity
from umbp_vllm import compat
from umbp_vllm.host_capacities import HostCapacities
from umbp_vllm.host_rank import HostPages, Mapping, RankHost
from umbp_vllm.host_stages import StagePages, largest, pages_of, share_stages, stages_of, writer_of
from umbp_vllm.host_talk import Talker
from umbp_vllm.host_words import Pages, Visit
from umbp_vllm.layout_groups import geometry_of
from umbp_vllm.metadata import PROTOCOL_VERSION, RankHello
from umbp_vllm.namespace import namespace_digest, rank_scope
from umbp_vllm.rank_kit import RankKit, asks_by_layer, kit_maker
from umbp_vllm.worker import Worker


@dataclass(frozen=True, slots=True)
class HostPlan:
    """One engine's pool in the daemon: the same on all its processes.

    ``identities`` are those of the stripes, in the order of the world ranks that write them; all have ``page_bytes``
    per page, of which an object has ``object_bytes``, by KV group.  ``dram_bytes`` is what the engine asks for, all
    stripes together.
    """

    config: UmbpConfig
    engine_id: str
    identities: tuple[Identity, ...]
    page_bytes: int
    object_bytes: tuple[int, ...]
    dram_bytes: int
    label: str

    @property
    def door(self) -> Door:
        """Where the daemon is."""
        return door_of(self.config)

    @property
    def wanted(self) -> WantedPages:
        """The plan in the daemon's words."""
        token = engine_token(self.engine_id)
        return WantedPages(self.door, self.identities, self.page_bytes, self.dram_bytes, token, self.label)


def check_host(config: UmbpConfig) -> None:
    """Raises ``ConfigError`` for what an engine cannot do over the daemon."""
    door_of(config)


def plan_of(vllm_config: Any, config: UmbpConfig, namespace: str, stages: Sequence[StagePages]) -> HostPlan:
    """The plan, as each of the engine's processes comes to it."""
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    identities = tuple(
        Identity(namespace, pages.layout, rank_scope(vllm_config, tp_rank, stage, pages.replicated))
        for stage, pages in enumerate(stages)
        for tp_rank in range(1 if pages.replicated else tp_size)
    )
    engine_id = str(vllm_config.kv_transfer_config.engine_id)  # the same in all processes, another one at each start
    label = f"vllm {vllm_config.model_config.model} {os.getpid()}"
    page_bytes = max(pages.page_bytes for pages in stages)
    return HostPlan(config, engine_id, identities, page_bytes, largest(stages), config.dram_capacity, label[:120])


def starter_of(config: UmbpConfig) -> Launcher | None:
    """What starts a daemon, if that is wanted."""
    return Launcher(socket_path(config), config) if config.daemon_auto_start else None


@dataclass(frozen=True, slots=True)
class HostDoor:
    """The leader's ways to the daemon.

    ``talker`` talks for it, ``follow`` has an observer told all that its pool there holds, ``capacities`` says how full
    that is.
    """

    talker: Talker
    follow: Callable[[PoolObserver], PoolFollower]
    capacities: HostCapacities


def door_maker(vllm_config: Any, config: UmbpConfig, namespace: str) -> Callable[[Sequence[RankHello]], HostDoor]:
    """Makes the leader's ways to the daemon, not open yet, once the workers have said what their pages are.

    Raises ``ConfigError`` for what cannot be done over the daemon.
    """
    check_host(config)

    def make(hellos: Sequence[RankHello]) -> HostDoor:
        stages = stages_of(hellos, vllm_config.parallel_config.tensor_parallel_size)
        plan = plan_of(vllm_config, config, namespace, stages)
        starter = starter_of(config)
        absent = None if starter is None else starter.start_soon
        talker = Talker(new_client(plan), config.call_timeout_ms / 1000, absent)
        digest = plan.wanted.identity.digest

        def follow(observer: PoolObserver) -> PoolFollower:
            return PoolFollower(plan.door, digest, observer, lambda deadline: talker.say(Visit()))

        return HostDoor(talker, follow, HostCapacities(talker.say))

    return make


def rank_host(plan: HostPlan, stripe: int, make_kit: Callable[[bytes, HostPages], RankKit]) -> tuple[RankHost, RankKit]:
    """This rank's mapping, and its first kit; starts a daemon and waits for it if that is wanted."""
    starter = starter_of(plan.config)
    if starter is not None and is_missing(plan.door):
        starter.start(plan.config.daemon_start_timeout_s)
    host = RankHost(lambda: new_mapping(plan, stripe), make_kit, plan.page_bytes)
    return host, host.open(plan.config.call_timeout_ms / 1000)


def make_host_worker(
    vllm_config: Any,
    kv_cache_config: Any,
    config: UmbpConfig,
    plugins: PluginHost,
    kv_caches: dict[str, Any],
    namespace: str,
) -> Worker:
    """This rank's half over the host's daemon, which is waited for a little.  Without one it has no pages yet."""
    parallel = vllm_config.parallel_config
    rank, tp_size = parallel.rank, parallel.tensor_parallel_size

    def look() -> StagePages:
        check_host(config)
        return pages_of(kv_cache_config, geometry_of(kv_cache_config, kv_caches), tp_size, vllm_config)

    stages = share_stages(look, parallel.pipeline_parallel_size)
    geometry = geometry_of(kv_cache_config, kv_caches)
    plan = plan_of(vllm_config, config, namespace, stages)
    writer, stripe = writer_of(stages, tp_size, rank)
    identity = plan.identities[stripe]
    own = stages[rank // tp_size]
    make_kit = kit_maker(config, plugins, geometry, identity, rank, object_bytes=plan.object_bytes)
    host, kit = rank_host(plan, stripe, make_kit)
    hello = RankHello(
        version=PROTOCOL_VERSION,
        world_rank=rank,
        writer_rank=writer,
        identity=namespace_digest(namespace),
        layout=own.layout,
        page_bytes=own.page_bytes,
        dram_pages=1,  # some; how many there are, the daemon says
        ssd_slots=0,
        slot_bytes=0,
        object_bytes=own.object_bytes,
        prefix=identity.digest,
        arena=kit.arena,
    )
    by_layer = asks_by_layer(vllm_config, geometry, config)
    clears_early = compat.clears_before_fences(vllm_config, kv_cache_config)
    return Worker(hello, kit, writes=writer == rank, by_layer=by_layer, host=host, clears_early=clears_early)


def new_client(plan: HostPlan) -> Pages:
    """The leader's client, not connected."""
    return PageClient(plan.wanted)


def new_mapping(plan: HostPlan, stripe: int) -> Mapping:
    """A rank's mapping, not open."""
    return RankArena(plan.wanted, stripe, plan.config.dram_prefault)
