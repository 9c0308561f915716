"""An engine of the kit that reports to a real master, and what the master must know of it, read from the engine itself.

L1 and L2 are read from the nodes of SGLang's tree, by the tokens on the way to them; L3 from our pool.  The ids are
computed from tokens by ``umbp_connectors.prompt_hashes``, as a router computes them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from sglang.srt.disaggregation.kv_events import kv_event_namespace_seed, namespaced_block_hash
from sglang.srt.managers.scheduler_components.kv_events_publisher import SchedulerKvEventsPublisher
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from tests.connectors.reporting.at_master import Held, known_at
from tests.master.app.master_process import MasterProcess
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.rig import Engine
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.prompt_hashes.hasher import Namespace
from umbp_connectors.prompt_hashes.sglang import SGLangHasher
from umbp_core.tiers import Tier
from umbp_sglang.reporting import NodeReporting

FLUSH = 60.0
NODE = "node of the kit"


def settings(master: MasterProcess, **more: object) -> dict[str, object]:
    """The part of the extra config that makes an engine report."""
    return {"master_address": f"umbp://{master.doors['native']}", "node_id": NODE, **more}


def published(prompt: Prompt, page_size: int, names: Any = None) -> list[bytes]:
    """What the event stream calls each page of ``prompt``; ``names`` is SGLang's table of adapters."""
    plain = SGLangHasher(page_size).hashes(prompt.tokens, Namespace(prompt.cache_salt or ""))
    if names is None or names.get(prompt.extra_key) is None:
        return plain
    seed = kv_event_namespace_seed(extra_key=prompt.extra_key, cache_salt=None)
    return [b"%d" % namespaced_block_hash(int(each), namespace_seed=seed) for each in plain]


def stored(prompt: Prompt, page_size: int) -> list[bytes]:
    """What the storage calls each page of ``prompt``."""
    key = RadixKey(array("q", prompt.tokens), extra_key=prompt.extra_key, cache_salt=prompt.cache_salt)
    whole = key.page_aligned(page_size)
    return [bytes.fromhex(each) for each in get_storage_hash_str(whole, page_size=page_size)] if len(whole) else []


class Reported:
    """``engine``, started and with a publisher as a scheduler has it, and ``master``."""

    def __init__(self, engine: Engine, master: MasterProcess) -> None:
        self.engine = engine
        self.master = master
        self.size = engine.setup.cfg.page_size
        self.names_of_pages: dict[bytes, bytes] = {}
        self.prompts: list[Prompt] = []
        with engine._as_rank():
            self.component = SchedulerKvEventsPublisher(
                kv_events_config=engine.setup.events,
                tree_cache=engine.cache,
                send_metrics_from_scheduler=None,
                max_running_requests=1,
                max_total_num_tokens=1,
                get_stats=lambda: None,
            )

    @property
    def reporting(self) -> NodeReporting:
        """What reports."""
        publisher = self.component.kv_event_publisher
        found = self.engine.backend.reporting if publisher is None else publisher.reporting
        assert isinstance(found, NodeReporting)
        return found

    def knows(self, prompts: Iterable[Prompt]) -> None:
        """Every prompt whose pages may be anywhere: a storage hash alone does not say what it is called."""
        for prompt in prompts:
            self.prompts.append(prompt)
            names = published(prompt, self.size, self.engine.names)
            self.names_of_pages.update(zip(stored(prompt, self.size), names, strict=True))

    def step(self) -> None:
        """What a scheduler does after each step."""
        self.component.publish_kv_events()

    def settle(self) -> None:
        """Wait until L3 has written to its SSD what it wants to."""
        for pool in self.engine.backend._pools.pools():
            for shard in pool.shards:
                assert not isinstance(shard, LocalPool) or shard.flush(FLUSH)

    def told(self, node: str = NODE) -> Held:
        """What the master knows, when it knows everything."""
        self.settle()
        self.step()
        assert self.reporting.reporter.flush(FLUSH)
        return known_at(self.master, node)

    def truth(self) -> Held:
        """What this rank holds."""
        held: Held = {Tier.HBM.value: set(), Tier.DRAM.value: set(), Tier.SSD.value: set()}
        for page, on_device, on_host in self._nodes():
            held[Tier.HBM] |= page if on_device else set()
            held[Tier.DRAM] |= page if on_host else set()
        for tier, keys in self.in_pool().items():
            held[tier] |= {self.names_of_pages[key] for key in keys}
        return {tier: names for tier, names in held.items() if names}

    def in_pool(self) -> dict[Tier, set[bytes]]:
        """The whole pages of L3, by what the storage calls them: all parts, on a tier that all of them share."""
        pools = self.engine.backend._pools.pools()
        shards = [shard for pool in pools if pool.name in ("kv", "indexer") for shard in pool.shards]
        parts = [shard.holdings() for shard in shards if isinstance(shard, LocalPool)]
        if len(parts) < len(shards) or not parts:
            return {}
        dram, ssd = (set.intersection(*(set(part[tier]) for part in parts)) for tier in (Tier.DRAM, Tier.SSD))
        somewhere = set.intersection(*(set(part[Tier.DRAM]) | set(part[Tier.SSD]) for part in parts))
        return {Tier.DRAM: dram, Tier.SSD: ssd | (somewhere - dram)}

    def assert_equal(self) -> Held:
        """The master knows exactly what there is; returns it."""
        told, truth = self.told(), self.truth()
        assert {
            tier: (truth.get(tier, set()) - names, names - truth.get(tier, set())) for tier, names in told.items()
        } == {tier: (set(), set()) for tier in told}, "what the master misses, and what it believes wrongly"
        assert told == truth
        return told

    def _nodes(self) -> Iterable[tuple[set[bytes], bool, bool]]:
        """Of every node of the tree the ids of its pages, and whether the device and the host have them."""
        core = self.engine.cache.tree_core
        seen = set()
        for prompt in self.prompts:
            found = self.engine.match(prompt)
            ids = published(prompt, self.size, self.engine.names)
            for end in (found.last_device_node, found.last_host_node):
                for node in core.collect_path_info([end])[0]:
                    if node.node_id not in seen:
                        seen.add(node.node_id)
                        pages = ids[node.path_start // self.size : node.path_end // self.size]
                        yield set(pages), node.full_value_len is not None, core.is_backuped(node.node_id)
        if self.engine.setup.core == "python":
            assert seen == self._walked(), "every node lies on the way of a prompt that is known"

    def _walked(self) -> set[Any]:
        cache, core = self.engine.cache, self.engine.cache.tree_core
        walked, waiting = set(), [cache.root_node_handle()]
        while waiting:
            children = core.get_child_node_ids(waiting.pop())
            walked.update(children)
            waiting += children
        return walked
