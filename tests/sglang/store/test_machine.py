"""The store beside a plain model: what comes back is what was stored, and with room for all, all of it comes back."""

from __future__ import annotations

import tempfile
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from tests.sglang.store.faults import Faults
from tests.sglang.store.model import Model
from tests.sglang.store.pools import PAGES, hashes, mha_pool, page_bytes, rows, storage_config
from umbp_sglang.store import UMBPStore

CHAIN = hashes(6)
PLACES = st.integers(0, len(CHAIN) - 1)
KEYS = st.lists(PLACES, min_size=1, max_size=4, unique=True).map(lambda places: [CHAIN[place] for place in places])
SHIFTS = st.integers(0, PAGES - 8)
"""Where on the host the pages of a call are."""


class StoreMachine(RuleBasedStateMachine):
    """A chain of KV pages and a side pool's, under evictions, faults, clears and restarts.

    ``roomy`` stores have room for everything and no faults: then the model is exact.  Otherwise it is an upper bound.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.pools = {"kv": mha_pool("page_first"), "swa": mha_pool("layer_first", heads=1)}
        self.faults = Faults()
        self.model = Model()
        self.exact = True

    @initialize(roomy=st.sampled_from([True, True, False]), disk=st.booleans())
    def start(self, roomy: bool, disk: bool) -> None:
        tiers: dict[str, Any] = {"dram_capacity": "4MiB" if roomy else 12 * 4096}
        if disk:
            tiers |= {"ssd_dir": self.folder.name, "ssd_capacity": "16MiB", "ssd_direct_io": False}
        self.config = storage_config(extra=tiers)
        self.roomy, self.disk, self.exact = roomy, disk, roomy
        self.open()

    def open(self) -> None:
        self.store = UMBPStore(self.config, self.pools["kv"], make_pool=self.faults.make)
        self.store.register_mem_host_pool_v2(self.pools["kv"], PoolName.KV)
        self.store.register_mem_host_pool_v2(self.pools["swa"], PoolName.SWA)
        self.store.on_host_pools_registered()

    def content(self, pool: str, keys: list[str], shift: int) -> dict[str, bytes]:
        return {key: page_bytes(self.pools[pool], shift + place) for place, key in enumerate(keys)}

    def check(self, pool: str, keys: list[str], ok: list[bool], known: dict[str, bytes]) -> None:
        """Pages that came back, to the end of the host pool, are pages that were stored under these names."""
        got = self.content(pool, keys, PAGES - 6)
        for key, there in zip(keys, ok, strict=True):
            assert not there or (pool, key, got[key]) in self.model.seen
            assert not self.exact or (got[key] if there else None) == known.get(key)

    @rule(keys=KEYS, shift=SHIFTS)
    def put(self, keys: list[str], shift: int) -> None:
        pages = self.content("kv", keys, shift)
        ok = self.store.batch_set_v1(keys, rows(*range(shift, shift + len(keys))))
        assert ok == [True] * len(keys) or not self.exact
        self.model.put(pages)

    @rule(keys=KEYS, shift=SHIFTS)
    def put_beside(self, keys: list[str], shift: int) -> None:
        pages = self.content("swa", keys, shift)
        indices = rows(*range(shift, shift + len(keys)))
        ok = self.store.batch_set_v2([PoolTransfer(PoolName.SWA, indices, keys=keys)])[PoolName.SWA]
        assert ok == [True] * len(keys) or not self.exact
        self.model.put_beside(pages)

    @rule(first=PLACES, last=PLACES, tail=st.integers(1, 2), shift=SHIFTS)
    def put_node(self, first: int, last: int, tail: int, shift: int) -> None:
        """As SGLang's backup thread does it: the side pages of a node's end, then its KV pages."""
        keys = CHAIN[first : last + 1] or CHAIN[:1]
        self.put_beside(keys[-tail:], shift)
        self.put(keys, shift)

    @rule(keys=KEYS)
    def get(self, keys: list[str]) -> None:
        ok = self.store.batch_get_v1(keys, rows(*range(PAGES - 6, PAGES - 6 + len(keys))))
        self.check("kv", keys, ok, self.model.kv)

    @rule(keys=KEYS)
    def get_beside(self, keys: list[str]) -> None:
        indices = rows(*range(PAGES - 6, PAGES - 6 + len(keys)))
        ok = self.store.batch_get_v2([PoolTransfer(PoolName.SWA, indices, keys=keys)])[PoolName.SWA]
        self.check("swa", keys, ok, self.model.side)

    @rule(tail=st.integers(1, 3))
    def look_up(self, tail: int) -> None:
        asked = PoolTransfer(PoolName.SWA, keys=CHAIN[:tail], hit_policy=PoolHitPolicy.TRAILING_PAGES)
        found = self.store.batch_exists_v2(CHAIN, [asked])
        prefix = self.store.batch_exists(CHAIN)
        assert found.kv_hit_pages == max(found.restorable_prefix_pages, default=0) <= len(CHAIN)
        if self.exact:
            assert prefix == self.model.prefix(CHAIN)
            assert found.restorable_prefix_pages == self.model.ends(CHAIN, tail)

    @rule(really=st.integers(0, 3))
    def clear(self, really: int) -> None:
        if not really:
            self.forget_all()

    def forget_all(self) -> None:
        self.store.clear()
        self.model.clear()
        assert self.store.batch_exists(CHAIN[:1]) == 0

    @rule(really=st.integers(0, 3))
    def restart(self, really: int) -> None:
        if really:
            return
        self.store.close()
        if self.disk:
            self.model.end()
        else:
            self.model.clear()
        self.open()

    @precondition(lambda self: not self.roomy)
    @rule(place=PLACES, error=st.booleans())
    def fail(self, place: int, error: bool) -> None:
        """From now on one page finds no room, or everything fails."""
        self.faults.full = bytes.fromhex(CHAIN[place]).__eq__
        self.faults.error = OSError("the machine is on fire") if error else None

    @precondition(lambda self: not self.roomy)
    @rule()
    def recover(self) -> None:
        self.faults.full = lambda key: False
        self.faults.error = None

    def teardown(self) -> None:
        for key in CHAIN:
            self.get([key])
            self.get_beside([key])
        self.store.close()
        self.folder.cleanup()


StoreMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStore = StoreMachine.TestCase
