"""Random transfers: contents against a plain model, and everything at once with everything cancelled."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umbp_connectors.transfer import Limits
from umbp_core.errors import TransferError
from umbp_core.ops import BlockCopy, Direction, OpStatus

PAGES = st.integers(0, 5)
BLOCKS = st.lists(st.tuples(PAGES, PAGES, st.sampled_from(["dram", "ssd"])), max_size=4, unique_by=lambda b: b[0])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), BLOCKS, st.booleans()),
        st.tuples(st.just("demote"), BLOCKS, st.booleans()),
        st.tuples(st.just("load"), BLOCKS, st.booleans()),
        st.tuples(st.just("flip"), PAGES, st.booleans()),
    ),
    max_size=12,
)


class Model:
    """What should lie where: bytes per HBM block, page and slot, and the checksum that goes with a page or slot."""

    def __init__(self, hbm: list[bytes]) -> None:
        self.hbm = hbm
        self.pages: dict[int, bytes] = {}
        self.slots: dict[int, bytes] = {}
        self.sums: dict[tuple[str, int], bytes] = {}


class Story:
    """Carries out steps on the engine and on the model; the key of an object is where it lies."""

    def __init__(self, rig: Any) -> None:
        self.rig = rig
        self.model = Model([rig.hbm(n) for n in range(6)])
        self.count = 0

    def step(self, kind: str, what: Any, faulty: bool) -> None:
        self.count += 1
        getattr(self, kind)(what, faulty)
        for number, data in enumerate(self.model.hbm):
            assert self.rig.hbm(number) == data
        for page, data in self.model.pages.items():
            assert bytes(self.rig.pages.page(page, 8000)) == data
        for slot, data in self.model.slots.items():
            assert self.rig.slots.data[slot][:8000] == data

    def execute(self, direction: Direction, blocks: list[BlockCopy]) -> Any:
        (result,) = self.rig.run(self.rig.op(f"op{self.count}", direction, blocks))
        return result

    def store(self, blocks: list[tuple[int, int, str]], faulty: bool) -> None:
        def fail(call: Any) -> None:
            raise TransferError("gather")

        if faulty:
            self.rig.device.on_copy = fail
        result = self.execute(Direction.STORE, [BlockCopy(b"key", 0, hbm, page) for page, hbm, _ in blocks])
        self.rig.device.on_copy = lambda call: None
        assert result.status is (OpStatus.FAILED if faulty and blocks else OpStatus.DONE)
        for number, (page, hbm, _) in enumerate(blocks):
            if result.status is OpStatus.DONE:
                self.model.pages[page] = self.model.hbm[hbm]
                self.model.sums["dram", page] = result.checksums[16 * number : 16 * number + 16]

    def demote(self, blocks: list[tuple[int, int, str]], faulty: bool) -> None:
        moved = [(page, slot) for slot, page, _ in blocks if page in self.model.pages]

        def fail(kind: str, slot: int) -> None:
            if slot == moved[-1][1]:
                raise OSError(28, "No space left on device")

        if faulty and moved:
            self.rig.slots.on_io = fail
        result = self.execute(Direction.DEMOTE, [BlockCopy(b"key", 0, -1, page, slot) for page, slot in moved])
        self.rig.slots.on_io = lambda kind, slot: None
        assert result.status is (OpStatus.FAILED if faulty and moved else OpStatus.DONE)
        for page, slot in moved:
            self.model.slots.pop(slot, None)
            self.model.sums.pop(("ssd", slot), None)
            if result.status is OpStatus.DONE:
                self.model.slots[slot] = self.model.pages[page]
                self.model.sums["ssd", slot] = self.model.sums["dram", page]

    def load(self, blocks: list[tuple[int, int, str]], faulty: bool) -> None:
        """From where an object should be; each block through a page of its own when it comes from SSD."""
        copies, sources = [], []
        for hbm, place, tier in blocks:
            expected = self.model.sums.get((tier, place), b"?" * 16)
            page, slot = (place, -1) if tier == "dram" else (40 + hbm, place)
            copies.append(BlockCopy(b"key", 0, hbm, page, slot, b"other rank's sum" + expected))
            sources.append((self.model.pages if tier == "dram" else self.model.slots).get(place))
        broken = {n for n, block in enumerate(copies) if faulty and block.ssd_slot >= 0}

        def fail(kind: str, slot: int) -> None:
            raise TransferError("read")

        if faulty:
            self.rig.slots.on_io = fail
        result = self.execute(Direction.LOAD, copies)
        self.rig.slots.on_io = lambda kind, slot: None
        right = [
            source is not None and self.vouched(block, source) for block, source in zip(copies, sources, strict=True)
        ]
        bad = tuple(n for n in range(len(copies)) if n in broken or not right[n])
        assert result.failed == bad
        assert result.status is (OpStatus.FAILED if bad else OpStatus.DONE)
        for n, (block, source) in enumerate(zip(copies, sources, strict=True)):
            if n not in bad and source is not None:
                self.model.hbm[block.hbm_block] = source

    def vouched(self, block: BlockCopy, source: bytes) -> bool:
        return bool(self.rig.checksum(b"key", source) == block.checksum_of(1))

    def flip(self, page: int, in_slot: bool) -> None:
        """A bit of a page or slot changes behind everyone's back."""
        where = self.model.slots if in_slot else self.model.pages
        if page in where:
            data = bytearray(where[page])
            data[123] ^= 8
            where[page] = bytes(data)
            if in_slot:
                self.rig.slots.data[page] = bytes(data) + self.rig.slots.data[page][8000:]
            else:
                self.rig.pages.array[page, 123] ^= 8


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_contents_follow_a_plain_model(make_rig: Callable[..., Any], steps: list[tuple[str, Any, bool]]) -> None:
    rig = make_rig()
    story = Story(rig)
    for kind, what, faulty in steps:
        story.step(kind, what, faulty)
    assert rig.engine.close(60.0)


@pytest.mark.parametrize("seed", range(8))
def test_everything_at_once_ends_exactly_once(make_rig: Callable[..., Any], seed: int) -> None:
    """300 ops, iterations, faults and cancellations on one forward thread; every op has one result, and it is true."""
    rng = random.Random(seed)
    rig = make_rig(limits=Limits(loads=3, stores=2, demotions=1))
    sources = [rig.put(b"k%d" % n, n, slot=-1 if n % 2 else n) for n in range(12)]
    rig.device.hbm[0][:12] = 0xEE
    faults = random.Random(seed + 1)

    def sometimes(*_: object) -> None:
        if faults.random() < 0.1:
            raise TransferError("injected")

    rig.device.on_copy = rig.slots.on_io = sometimes
    results, submitted, iteration = [], [], 0
    for number in range(300):
        kind = rng.choice(["load", "load", "store", "demote"])
        after = rng.choice([None, iteration, iteration + 1])
        n = rng.randrange(12)
        blocks = {
            "load": [BlockCopy(b"k%d" % n, 0, n, n, sources[n].ssd_slot, sources[n].checksums)],
            "store": [BlockCopy(b"s", 0, 14, 40 + n)],
            "demote": [BlockCopy(b"d", 0, -1, 30, 100 + n)],
        }[kind]
        op = rig.op(
            f"{kind}{number}.{n}",
            {"load": Direction.LOAD, "store": Direction.STORE, "demote": Direction.DEMOTE}[kind],
            blocks,
            after,
        )
        rig.engine.submit([op])
        submitted.append(op.op_id)
        if rng.random() < 0.2:
            rig.engine.cancel([rng.choice(submitted)])
        if rng.random() < 0.3:
            rig.engine.end_iteration(iteration, f"fence {iteration}")
            iteration += 1
            results += rig.engine.poll()
    rig.engine.end_iteration(iteration + 1, "last")
    assert rig.engine.wait(submitted, 60.0)
    assert rig.engine.close(60.0)
    results += rig.engine.poll()
    assert sorted(result.op_id for result in results) == sorted(submitted)
    assert sorted(rig.engine.take_released()) == sorted(result.op_id for result in results if result.quarantined)
    loaded = {int(r.op_id.partition(".")[2]) for r in results if r.direction is Direction.LOAD and not r.failed}
    assert loaded, "nothing was loaded at all"
    for n in range(12):
        assert rig.hbm(n) == (rig.content(b"k%d" % n) if n in loaded else b"\xee" * 8000)
    assert len(rig.observer.ops) == 300
