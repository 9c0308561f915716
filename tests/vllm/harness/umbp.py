"""The harness around the real connector: what its pool holds, gates and faults in its transfers, and its leaks."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

import umbp_vllm
from tests.connectors.waiting import PATIENCE
from tests.vllm.harness.engine import Harness
from tests.vllm.harness.errors import ConnectorFault, LeakDetected, StuckTransfer
from tests.vllm.harness.model import Prefix, start_state
from tests.vllm.harness.rank import make_layers, object_of
from tests.vllm.harness.spec import EngineSpec
from umbp_core.errors import TransferError
from umbp_core.ids import block_key, group_of
from umbp_core.ops import Direction
from umbp_core.ports import DeviceCopier, LayerCopier
from umbp_core.tiers import Tier
from umbp_vllm.pool import LeaderPool
from umbp_vllm.worker import Worker

GATE_SECONDS = 2 * PATIENCE
"""Longer than any test waits for what others do while copies are held."""
EXTRA: dict[str, Any] = {
    "dram_capacity": "2MiB",
    "dram_prefault": False,
    "log_level": "error",
    "debug_socket": False,
    "lookup_timeout_ms": 60_000,
    "share_load_timeout_ms": 60_000,
}
"""Defaults of the tests: 512 blocks of DRAM, and no wait that ends because the machine is slow."""


class GatedCopier:
    """A rank's copier that can be held, or made to fail, per direction."""

    def __init__(self, inner: DeviceCopier, layers: LayerCopier) -> None:
        self._inner = inner
        self._layers = layers
        self._open = {Direction.LOAD: threading.Event(), Direction.STORE: threading.Event()}
        self.fails: set[Direction] = set()
        self.calls: Counter[Direction] = Counter()
        self.entered = {Direction.LOAD: threading.Event(), Direction.STORE: threading.Event()}
        """Set when a copy of this direction has arrived at the gate."""
        for event in self._open.values():
            event.set()

    def hold(self, direction: Direction) -> None:
        """Let no copy of ``direction`` begin."""
        self.entered[direction].clear()
        self._open[direction].clear()

    def is_held(self, direction: Direction) -> bool:
        """Whether copies of ``direction`` wait."""
        return not self._open[direction].is_set()

    def release(self, direction: Direction) -> None:
        """Let the copies go on."""
        self._open[direction].set()

    def release_all(self) -> None:
        """Let everything go on."""
        for event in self._open.values():
            event.set()

    def _pass(self, direction: Direction) -> None:
        self.calls[direction] += 1
        self.entered[direction].set()
        if not self._open[direction].wait(GATE_SECONDS):
            raise TransferError(f"the test never let {direction.name} go on")
        if direction in self.fails:
            raise TransferError(f"the test makes {direction.name} fail")

    @property
    def on_host(self) -> bool:
        return self._inner.on_host

    def fence(self) -> object:
        return self._inner.fence()

    def gather(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        self._pass(Direction.STORE)
        self._inner.gather(group, blocks, pages, fence)

    def scatter(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        self._pass(Direction.LOAD)
        self._inner.scatter(group, blocks, pages, fence)

    def bands(self, group: int) -> int:
        return self._layers.bands(group)

    def band_layers(self, group: int, band: int) -> Sequence[str]:
        return self._layers.band_layers(group, band)

    def gather_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        self._pass(Direction.STORE)
        self._layers.gather_band(group, band, blocks, pages, fence)

    def scatter_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        self._pass(Direction.LOAD)
        self._layers.scatter_band(group, band, blocks, pages, fence)


class UmbpHarness(Harness):
    """An engine whose connector is ``umbp``.

    Beyond what every engine checks: no HBM block is given out while an op in flight names it (law L3), every
    published object holds the bytes that the model computes for its key, and nothing is left when idle.
    """

    def __init__(self, extra: dict[str, Any] | None = None, *, shake_hands: bool = True, **spec: Any) -> None:
        umbp_vllm.register()
        whole = EngineSpec("umbp", extra={**EXTRA, **(extra or {})}, **spec)
        super().__init__(whole, idle_seconds=0.0005, shake_hands=shake_hands)
        self.expects_internal_failures = False
        self.loses_messages = False
        """Whether the leader may believe longer than it is true that an op is under way."""
        self.rotten: set[bytes] = set()
        """Keys that :meth:`corrupt` was used on; their bytes are not compared any more."""
        self.copiers = [self._gate(worker) for worker in self.workers]
        self.fences_wait = False
        """Whether a fence waits for stores that the test holds; otherwise these pass during it."""
        for worker, copier in zip(self.workers, self.copiers, strict=True):
            worker.fence = self._fence(worker.fence, copier)  # type: ignore[method-assign]
        self._guard_allocations()

    # What is inside ------------------------------------------------------------------------------------

    @property
    def pool(self) -> LeaderPool:
        """The leader's pool."""
        pool = self.leader.leader.pool  # type: ignore[attr-defined]
        assert pool is not None, "the pool never opened"
        return pool  # type: ignore[no-any-return]

    @property
    def workers(self) -> list[Worker]:
        """The worker halves, by rank."""
        return [rank.connector._worker for rank in self.ranks]  # type: ignore[attr-defined]

    def stat(self, name: str, *labels: str) -> float:
        """A counter of the leader that the engine has not collected yet, and all that it has."""
        key = "|".join((f"vllm:umbp_{name}", *labels))
        return self._collected[key] + self.leader.leader.stats.data.get(key, 0)  # type: ignore[attr-defined]

    def _make_scheduler(self) -> Any:
        scheduler = super()._make_scheduler()
        self._collected: Counter[str] = Counter()
        original = scheduler.connector.get_kv_connector_stats

        def get_kv_connector_stats() -> Any:
            stats = original()
            if stats is not None:
                self._collected.update(stats.data)
            return stats

        scheduler.connector.get_kv_connector_stats = get_kv_connector_stats
        return scheduler

    def _gate(self, worker: Worker) -> GatedCopier:
        tools = worker.engine._tools
        assert tools.layers is not None
        copier = GatedCopier(tools.copier, tools.layers)
        worker.engine._tools = dataclasses.replace(tools, copier=copier, layers=copier)
        return copier

    def store(self, prompt: Sequence[int]) -> None:
        """Compute a prompt, let the pool have it, and make vLLM itself forget it."""
        self.add(prompt, max_tokens=1)
        self.drain()
        if not self.reset_prefix_cache():
            raise ConnectorFault("blocks are held although the engine is idle")

    def pace(self) -> None:
        """From now on every transfer ends in the step that started it, whatever the machine's speed.

        Copies pass only at the end of a step, and then all of them, so what a run does follows from its events alone.
        """
        step = self._step

        def paced_step() -> bool:
            for thread in threading.enumerate():
                if thread.name == "umbp-adapter":
                    thread.join(GATE_SECONDS)
            for direction in (Direction.LOAD, Direction.STORE):
                self.hold(direction)
            executed = step()
            for direction in (Direction.LOAD, Direction.STORE):
                self.release(direction)
            for worker in self.workers:
                if not worker.engine.wait([str(op["op_id"]) for op in worker.engine.dump()], GATE_SECONDS):
                    raise StuckTransfer(f"transfers that nothing holds do not end: {worker.engine.dump()}")
            return executed

        self._step = paced_step  # type: ignore[method-assign]

    def _fence(self, fence: Callable[[Any], None], copier: GatedCopier) -> Callable[[Any], None]:
        def passing_fence(metadata: Any) -> None:
            passes = copier.is_held(Direction.STORE) and not self.fences_wait
            if passes:
                copier.release(Direction.STORE)
            fence(metadata)
            if passes:
                copier.hold(Direction.STORE)

        return passing_fence

    def hold(self, direction: Direction) -> None:
        """Hold the copies of ``direction`` on every rank."""
        for copier in self.copiers:
            copier.hold(direction)

    def release(self, direction: Direction) -> None:
        """Let them go on."""
        for copier in self.copiers:
            copier.release(direction)

    def pass_time(self, seconds: float) -> None:
        """Time goes on by so much for the transfers of every rank."""
        for worker in self.workers:
            clock = worker.engine._clock
            worker.engine._clock = lambda clock=clock: clock() + seconds

    # Keys and bytes ------------------------------------------------------------------------------------

    def keys(self, tokens: Sequence[int], salt: str | None = None, lora: Any = None) -> list[list[bytes]]:
        """The block keys of a prompt, per group."""
        params = SamplingParams(max_tokens=1)
        request = Request("", list(tokens), params, None, cache_salt=salt, lora_request=lora, block_hasher=self._hasher)
        unit = self.geometry.hash_block_size
        keys = []
        for group, spec in enumerate(self.geometry.scheduler.kv_cache_groups):
            step = spec.kv_cache_spec.block_size // unit
            ends = range(step - 1, len(request.block_hashes), step)
            keys.append([block_key(bytes(request.block_hashes[end]), group) for end in ends])
        return keys

    def present(self, tokens: Sequence[int], tier: Tier | None = None, group: int = 0) -> list[bool]:
        """For each block of a prompt, whether the pool holds it (in ``tier``)."""
        directory = self.pool.directory
        return [
            bool(directory.tiers_of(key)) if tier is None else directory.copy(key, tier) is not None
            for key in self.keys(tokens)[group]
        ]

    def drop_from(self, tier: Tier, tokens: Sequence[int] = ()) -> None:
        """Make the pool forget a prompt, or everything, in one tier."""
        directory = self.pool.directory
        for key in [key for group in self.keys(tokens) for key in group] if tokens else list(directory._masks):
            if tier is Tier.DRAM or self.pool.catalogue is not None:
                directory.drop(key, tier)
        self.pool.settle()

    def object_bytes(self, rank: int, key: bytes, tier: Tier) -> npt.NDArray[np.uint8]:
        """A copy of what rank ``rank`` holds under ``key``."""
        copy = self.pool.directory.copy(key, tier)
        assert copy is not None, f"{key.hex()} is not in {tier.name}"
        tools = self.workers[rank].engine._tools
        nbytes = tools.object_bytes[group_of(key)]
        if tier is Tier.DRAM:
            return np.array(tools.pages.page(copy.pages[0], nbytes))
        assert tools.slots is not None
        buffer = np.empty(-(-nbytes // 4096) * 4096, dtype=np.uint8)
        tools.slots.read_into(copy.pages[0], memoryview(buffer))
        return buffer[:nbytes]

    def corrupt(self, rank: int, key: bytes, tier: Tier = Tier.DRAM) -> None:
        """Flip one bit of an object."""
        self.rotten.add(key)
        copy = self.pool.directory.copy(key, tier)
        assert copy is not None, f"{key.hex()} is not in {tier.name}"
        tools = self.workers[rank].engine._tools
        if tier is Tier.DRAM:
            tools.pages.page(copy.pages[0])[3] ^= 0x10
            return
        assert tools.slots is not None
        with open(tools.slots.path, "r+b") as slab:
            slab.seek(copy.pages[0] * tools.slots.slot_bytes + 3)
            byte = slab.read(1)[0]
            slab.seek(-1, 1)
            slab.write(bytes([byte ^ 0x10]))

    def idle_objects(self, tier: Tier) -> list[bytes]:
        """Published objects of ``tier`` that no op reads at the moment, oldest first."""
        state = self.pool.directory._spaces.get(tier)
        return [key for key, copy in state.published.items() if copy.pages[0] not in state.pins] if state else []

    def check_stored(self) -> int:
        """Compare every published object of a known prefix, on every rank, with the model; returns how many."""
        wanted = dict(self._truths())
        checked = 0
        for rank, config in zip(self.ranks, self.geometry.ranks, strict=True):
            _, layers = make_layers(config, rank.rank % self.spec.tp)
            for tier in (Tier.DRAM, Tier.SSD):
                if tier is Tier.SSD and self.pool.catalogue is None:
                    continue
                for key, (group, states) in wanted.items():
                    if key in self.rotten or self.pool.directory.copy(key, tier) is None:
                        continue
                    if not np.array_equal(self.object_bytes(rank.rank, key, tier), object_of(layers, group, states)):
                        raise ConnectorFault(f"rank {rank.rank}: object {key.hex()} in {tier.name} is not the model's")
                    checked += 1
        return checked

    def _truths(self) -> Iterator[tuple[bytes, tuple[int, Any]]]:
        for name, asked in self.asked.items():
            if self._runner.starts[name].media:
                continue
            tokens = asked.prompt + self.tokens[name]
            prefix = Prefix(start_state(asked.salt, asked.lora))
            prefix.extend(tokens)
            for group, keys in enumerate(self.keys(tokens, asked.salt, self._lora(asked.lora))):
                size = self.geometry.scheduler.kv_cache_groups[group].kv_cache_spec.block_size
                for block, key in enumerate(keys):
                    yield key, (group, prefix.slice(block * size, (block + 1) * size))

    # Checks --------------------------------------------------------------------------------------------

    def _guard_allocations(self) -> None:
        """L3: whatever the connector says, a block that an op in flight names must not get a new owner.

        Unless the connector let go of it for a reset and fences the op; then its bytes tell (:meth:`check_stored`).
        """
        block_pool = self.scheduler.kv_cache_manager.block_pool
        let_go = self.leader.leader.held.let_go  # type: ignore[attr-defined]
        fenced: set[str] = set()

        def noted_let_go() -> list[str]:
            ops: list[str] = let_go()
            fenced.update(ops)
            return ops

        self.leader.leader.held.let_go = noted_let_go  # type: ignore[attr-defined]
        original: Callable[[int], list[Any]] = block_pool.get_new_blocks

        def get_new_blocks(count: int) -> list[Any]:
            blocks = original(count)
            given = {block.block_id for block in blocks}
            pool = self.leader.leader.pool  # type: ignore[attr-defined]
            for flight in () if pool is None else pool.ledger._in_flight.values():
                named = {copy.hbm_block for copy in flight.op.blocks if copy.hbm_block >= 0}
                if given & named and flight.op.op_id not in fenced and not self._is_over(flight.op.op_id):
                    raise ConnectorFault(f"blocks {sorted(given & named)} got a new owner during {flight.op}")
            return blocks

        block_pool.get_new_blocks = get_new_blocks  # type: ignore[method-assign]

    def _is_over(self, op_id: str) -> bool:
        """Whether no rank is at work on an op although the leader has not heard of its end."""
        if not self.loses_messages:
            return False
        return all(
            op_id not in {op["op_id"] for op in worker.engine.dump()} | worker.engine.quarantined()
            for worker in self.workers
        )

    def internal_failures(self) -> dict[str, int]:
        """Exceptions that the facade caught, by method, over both roles."""
        failures = Counter(self.leader._failures)  # type: ignore[attr-defined]
        for rank in self.ranks:
            failures.update(rank.connector._failures)  # type: ignore[attr-defined]
        return dict(failures)

    def check_no_leak(self) -> None:
        """As for every engine; and no slot, op, pin, page or held block of ours is left."""
        leader = self.leader.leader  # type: ignore[attr-defined]
        left = {
            "requests": leader.live_requests,
            "slots": len(leader._slots),
            "ops": len(self.pool.ledger),
            "held": len(self.pool.held),
            "staged": self.pool.loads.staged,
            "shared loads": len(self.pool.loads._loading) + len(self.pool.loads._loading_again),
            "quarantined": self.pool.ledger.quarantined,
            "worker ops": sum(worker.engine.pending() for worker in self.workers),
            "worker loads": sum(len(worker._loads) for worker in self.workers),
            "worker slots": sum(len(worker._slots) for worker in self.workers),
        }
        for tier in (Tier.DRAM, Tier.SSD):
            if tier is Tier.DRAM or self.pool.catalogue is not None:
                stats = self.pool.directory.stats(tier)
                left[f"{tier.name} pins"] = stats.pinned
                left[f"{tier.name} reservations"] = stats.reserved
                left[f"{tier.name} lost pages"] = stats.total_pages - stats.free_pages - stats.objects
        wrong = {name: count for name, count in left.items() if count}
        if wrong:
            raise LeakDetected(f"an idle umbp still has {wrong}")
        super().check_no_leak()
        if self.internal_failures() and not self.expects_internal_failures:
            raise ConnectorFault(f"exceptions inside the connector: {self.internal_failures()}")

    def close(self, check: bool = True) -> None:
        for copier in self.copiers:
            copier.release_all()
        super().close(check)
