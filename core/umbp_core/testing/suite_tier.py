"""What every tier has to do, as test classes to subclass: :class:`DramTierSuite` and :class:`SsdTierSuite`.

:class:`SlotRunsSuite` is for SSD tiers that move several neighbouring slots in one go.

A test of yours gives the fixture ``opener``: a function that opens your tier with pages (or slots) of so many bytes,
and so many of them, always at the same place.  For an SSD tier it is called in other processes too: let it be something
that can be pickled, such as a frozen dataclass of a module that can be imported::

    @dataclass(frozen=True)
    class Opener:
        folder: Path

        def __call__(self, slot_bytes: int, slots: int) -> SsdTier:
            return my_tier(self.folder, slot_bytes, slots)

    class TestMyTier(SsdTierSuite):
        @pytest.fixture
        def opener(self, tmp_path: Path) -> Opener:
            return Opener(tmp_path)

The suite looks at behaviour, limits, several threads at once, and for SSD at restarts and processes that are killed.
What it does not ask for: that bytes are those that were stored.  Whoever reads verifies them, so that a tier may lose
what it has, as long as it says so or gives bytes that do not verify.
"""

from __future__ import annotations

import multiprocessing
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from umbp_core.errors import StateError, TierUnavailable, UmbpError
from umbp_core.ports import DramTier, SlotRuns, SsdTier
from umbp_core.testing.tier_cells import (
    CELL,
    CELLS,
    PATIENCE_S,
    Cells,
    PageCells,
    SlotCells,
    pattern,
    receive,
    write_until_killed,
)


class TierSuite:
    """What both kinds have in common; subclass one of the kinds."""

    @pytest.fixture
    def cells(self) -> Cells:
        """An open tier of ``CELLS`` cells of ``CELL`` bytes."""
        raise AssertionError(f"{type(self).__name__} is no suite of its own; subclass DramTierSuite or SsdTierSuite")

    # Behaviour.

    @pytest.mark.parametrize("nbytes", [1, 511, 4095, 4096, 4097, CELL - 1, CELL])
    def test_what_was_written_comes_back(self, cells: Cells, nbytes: int) -> None:
        """Whatever its length."""
        data = pattern(1, nbytes, nbytes)
        cells.write(1, data)
        assert cells.read(1, nbytes) == data
        assert cells.read(1, nbytes // 2 + 1) == data[: nbytes // 2 + 1]

    def test_cells_are_apart(self, cells: Cells) -> None:
        """A write changes no other cell."""
        for cell in range(CELLS):
            cells.write(cell, pattern(cell, 0, CELL))
        cells.write(2, pattern(2, 1, CELL))
        found = [cells.read(cell, CELL) for cell in range(CELLS)]
        assert found == [pattern(cell, int(cell == 2), CELL) for cell in range(CELLS)]

    @pytest.mark.parametrize("seed", range(3))
    def test_the_last_write_counts(self, cells: Cells, seed: int) -> None:
        """As in a plain dictionary, for a few hundred writes and reads."""
        chance = random.Random(seed)
        model: dict[int, bytes] = {}
        for step in range(300):
            cell = chance.randrange(CELLS)
            if chance.random() < 0.5:
                model[cell] = pattern(cell, step, chance.choice([1, 4096, 5000, CELL]))
                cells.write(cell, model[cell])
            elif cell in model:
                assert cells.read(cell, len(model[cell])) == model[cell]

    # Limits.

    @pytest.mark.parametrize("cell", [-1, CELLS, CELLS + 100])
    def test_cells_that_do_not_exist(self, cells: Cells, cell: int) -> None:
        """They are the caller's mistake, and nothing is touched."""
        cells.write(CELLS - 1, pattern(0, 0, CELL))
        with pytest.raises(StateError):
            cells.read(cell, 4096)
        with pytest.raises(StateError):
            cells.write(cell, bytes(4096))
        assert cells.read(CELLS - 1, CELL) == pattern(0, 0, CELL)

    def test_more_bytes_than_a_cell_has(self, cells: Cells) -> None:
        """They are refused before the neighbour is reached."""
        cells.write(1, pattern(1, 0, CELL))
        with pytest.raises(StateError):
            cells.write(0, bytes(CELL + 1))
        with pytest.raises(StateError):
            cells.read(0, CELL + 1)
        assert cells.read(1, CELL) == pattern(1, 0, CELL)

    def test_closing_may_be_repeated(self, cells: Cells) -> None:
        """And nothing can be done afterwards."""
        cells.write(0, pattern(0, 0, CELL))
        cells.close()
        cells.close()
        with pytest.raises(StateError):
            cells.read(0, CELL)
        with pytest.raises(StateError):
            cells.write(0, bytes(CELL))

    # Concurrency.

    def test_many_threads_with_cells_of_their_own(self, cells: Cells) -> None:
        """Nobody reads what somebody else wrote."""
        wrong: list[str] = []

        def work(cell: int) -> None:
            for generation in range(40):
                data = pattern(cell, generation, CELL)
                cells.write(cell, data)
                if cells.read(cell, CELL) != data:
                    wrong.append(f"cell {cell}, generation {generation}")

        _run([lambda cell=cell: work(cell) for cell in range(CELLS)])  # type: ignore[misc]
        assert wrong == []

    def test_many_threads_that_read_one_cell(self, cells: Cells) -> None:
        """All of them get it."""
        data = pattern(3, 0, CELL)
        cells.write(3, data)
        found: list[bytes] = []
        _run([lambda: found.extend(cells.read(3, CELL) for _ in range(20))] * 4)
        assert found == [data] * 80


class DramTierSuite(TierSuite):
    """For a tier of pages in memory.  The fixture ``opener`` takes bytes of a page, pages and staging pages."""

    @pytest.fixture
    def opener(self) -> Callable[[int, int, int], DramTier]:
        """Opens the tier under test; to be overridden."""
        raise AssertionError(f"{type(self).__name__} has to give the fixture `opener`")

    @pytest.fixture
    def tier(self, opener: Callable[[int, int, int], DramTier]) -> Iterator[DramTier]:
        """The tier, with one page less for objects than there are cells, which is for staging."""
        with closing(opener(CELL, CELLS - 1, 1)) as tier:
            yield tier

    @pytest.fixture
    def cells(self, tier: DramTier) -> Cells:
        """The pages as cells."""
        return PageCells(tier)

    def test_geometry(self, tier: DramTier) -> None:
        """It is the one that was asked for."""
        assert (tier.page_bytes, tier.pages, tier.staging_pages) == (CELL, CELLS - 1, 1)
        assert tier.array.shape == (CELLS, CELL)
        assert tier.array.dtype == np.uint8
        assert tier.array.flags.writeable

    def test_pages_are_views_of_the_array(self, tier: DramTier) -> None:
        """Bytes that are written to one are in the other, without a copy."""
        for index in range(CELLS):
            tier.page(index)[:] = pattern(index, 0, CELL)
            assert tier.array[index].tobytes() == pattern(index, 0, CELL)
        tier.array[1] = 7
        assert tier.page(1, 100).tobytes() == b"\x07" * 100
        assert len(tier.page(1, 100)) == 100

    def test_a_view_outlives_the_tier(self, tier: DramTier) -> None:
        """Closing does not take the memory away from under somebody."""
        view = tier.page(0)
        view[:] = pattern(0, 0, CELL)
        tier.close()
        assert view.tobytes() == pattern(0, 0, CELL)


class SsdTierSuite(TierSuite):
    """For a tier of slots.  The fixture ``opener`` takes bytes of a slot and slots; see the top of this module."""

    kills = 3
    """How often a writer is killed."""

    @pytest.fixture
    def opener(self) -> Callable[[int, int], SsdTier]:
        """Opens the tier under test; to be overridden."""
        raise AssertionError(f"{type(self).__name__} has to give the fixture `opener`")

    @pytest.fixture
    def tier(self, opener: Callable[[int, int], SsdTier]) -> Iterator[SsdTier]:
        """The tier."""
        with closing(opener(CELL, CELLS)) as tier:
            yield tier

    @pytest.fixture
    def cells(self, tier: SsdTier) -> Cells:
        """The slots as cells."""
        return SlotCells(tier)

    def test_geometry(self, tier: SsdTier) -> None:
        """It is the one that was asked for."""
        assert (tier.slab.slot_bytes, tier.slab.slots, tier.slots) == (CELL, CELLS, CELLS)
        assert tier.is_new

    def test_memory_of_any_kind_and_place(self, tier: SsdTier) -> None:
        """Views that begin anywhere are read and written."""
        source = np.frombuffer(pattern(0, 0, CELL + 3), dtype=np.uint8)[3:]
        target = np.zeros(CELL + 5, dtype=np.uint8)
        tier.slab.write_from(0, source)
        tier.slab.read_into(0, target[5:].data)
        assert target[5:].tobytes() == source.tobytes()
        assert not target[:5].any()

    def test_memory_that_is_read_only(self, tier: SsdTier) -> None:
        """It cannot be read into."""
        tier.slab.write_from(0, bytes(CELL))
        with pytest.raises(StateError):
            tier.slab.read_into(0, bytes(CELL))

    def test_slots_that_were_never_written(self, tier: SsdTier) -> None:
        """They hold some bytes, or say that they do not."""
        buffer = bytearray(CELL)
        outcomes = []
        for slot in range(CELLS):
            try:
                tier.slab.read_into(slot, buffer)
                outcomes.append("bytes")
            except UmbpError as error:
                outcomes.append(type(error).__name__)
        assert set(outcomes) <= {"bytes", "TransferError", "VerificationError"}

    def test_a_restart_finds_what_was_written(self, opener: Callable[[int, int], SsdTier]) -> None:
        """Also when nobody said that it should be synced."""
        for generation in range(2):
            with closing(opener(CELL, CELLS)) as tier:
                assert tier.is_new == (generation == 0)
                cells = SlotCells(tier)
                for cell in range(CELLS) if generation else ():
                    assert cells.read(cell, CELL) == pattern(cell, generation - 1, CELL)
                for cell in range(CELLS):
                    cells.write(cell, pattern(cell, generation, CELL))
                tier.slab.sync()

    @pytest.mark.parametrize("slots", [CELLS - 2, CELLS + 2])
    def test_another_number_of_slots_keeps_what_fits(self, opener: Callable[[int, int], SsdTier], slots: int) -> None:
        """Fewer or more."""
        with closing(opener(CELL, CELLS)) as tier:
            for cell in range(CELLS):
                tier.slab.write_from(cell, pattern(cell, 0, CELL))
        with closing(opener(CELL, slots)) as tier:
            assert tier.slots == slots
            kept = min(slots, CELLS)
            assert [SlotCells(tier).read(cell, CELL) for cell in range(kept)] == [
                pattern(cell, 0, CELL) for cell in range(kept)
            ]

    def test_a_second_owner_is_turned_away(self, opener: Callable[[int, int], SsdTier], tier: SsdTier) -> None:
        """And harms nothing."""
        tier.slab.write_from(0, pattern(0, 0, CELL))
        with pytest.raises(TierUnavailable):
            opener(CELL, CELLS)
        assert SlotCells(tier).read(0, CELL) == pattern(0, 0, CELL)

    def test_closing_under_transfers(self, tier: SsdTier) -> None:
        """They end well, or say that the tier is closed; nothing hangs."""
        begun = threading.Barrier(4)
        errors: list[UmbpError] = []

        def work(slot: int) -> None:
            begun.wait(PATIENCE_S)
            try:
                for generation in range(100_000):
                    tier.slab.write_from(slot, pattern(slot, generation, CELL))
            except UmbpError as error:
                errors.append(error)

        def close() -> None:
            begun.wait(PATIENCE_S)
            tier.close()

        _run([lambda: work(0), lambda: work(1), lambda: work(2), close])
        assert [type(error) for error in errors] == [StateError] * 3

    def test_a_killed_writer(self, opener: Callable[[int, int], SsdTier]) -> None:
        """What it was told to be written is there; of the write that it was in, anything may be."""
        context = multiprocessing.get_context("spawn")
        chance = random.Random(7)
        known: dict[int, int] = {}
        for kill in range(self.kills):
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=write_until_killed, args=(opener, there, kill * 1_000_000))
            child.start()
            there.close()
            receive(here, chance.randrange(1, 40), known)
            child.kill()
            child.join(PATIENCE_S)
            begun = receive(here, None, known)
            here.close()
            with closing(opener(CELL, CELLS)) as tier:
                cells = SlotCells(tier)
                for cell, generation in known.items():
                    if cell != begun:
                        assert cells.read(cell, CELL) == pattern(cell, generation, CELL)
            if begun is not None:
                known.pop(begun, None)


class SlotRunsSuite(SsdTierSuite):
    """For an SSD tier whose slab also moves neighbouring slots in one go (``SlotRuns`` in ``umbp_core.ports``)."""

    @pytest.fixture
    def runs(self, tier: SsdTier) -> SlotRuns:
        """The slots, each of which holds something."""
        slab = tier.slab
        assert isinstance(slab, SlotRuns), "the slab lacks read_run() or write_run(); SsdTierSuite is the suite for it"
        for slot in range(CELLS):
            slab.write_from(slot, pattern(slot, 0, CELL))
        return slab

    @pytest.mark.parametrize(("first", "count"), [(0, 1), (0, CELLS), (1, 3), (CELLS - 2, 2)])
    def test_a_run_is_what_its_slots_are(self, runs: SlotRuns, cells: Cells, first: int, count: int) -> None:
        """Each view goes into the slot of its own, wherever in memory it is, and no other slot changes."""
        scattered = np.zeros((2 * count, CELL), dtype=np.uint8)
        for index in range(count):
            scattered[2 * (count - 1 - index)] = np.frombuffer(pattern(first + index, 1, CELL), dtype=np.uint8)
        runs.write_run(first, [scattered[2 * (count - 1 - index)] for index in range(count)])
        for cell in range(CELLS):
            assert cells.read(cell, CELL) == pattern(cell, int(first <= cell < first + count), CELL)

    @pytest.mark.parametrize(("first", "count"), [(0, 1), (0, CELLS), (1, 3), (CELLS - 2, 2)])
    def test_a_run_that_is_read(self, runs: SlotRuns, first: int, count: int) -> None:
        """Each slot comes into the view of its own, wherever in memory it is."""
        scattered = np.zeros((2 * count, CELL), dtype=np.uint8)
        runs.read_run(first, [scattered[2 * (count - 1 - index)] for index in range(count)])
        for index in range(count):
            assert scattered[2 * (count - 1 - index)].tobytes() == pattern(first + index, 0, CELL)
        assert not scattered[1::2].any(), "nothing beside them"

    @pytest.mark.parametrize("first", [-1, CELLS - 1, CELLS])
    def test_runs_that_leave_the_tier(self, runs: SlotRuns, cells: Cells, first: int) -> None:
        """They are refused as a whole."""
        with pytest.raises(StateError):
            runs.write_run(first, [bytes(CELL), bytes(CELL)])
        with pytest.raises(StateError):
            runs.read_run(first, [bytearray(CELL), bytearray(CELL)])
        assert [cells.read(cell, CELL) for cell in range(CELLS)] == [pattern(cell, 0, CELL) for cell in range(CELLS)]

    def test_runs_beside_each_other(self, runs: SlotRuns, cells: Cells) -> None:
        """Threads that write neighbouring runs do not reach into each other's."""
        half = CELLS // 2

        def work(first: int) -> None:
            for generation in range(1, 21):
                runs.write_run(first, [pattern(first + index, generation, CELL) for index in range(half)])

        _run([lambda: work(0), lambda: work(half)])
        assert [cells.read(cell, CELL) for cell in range(2 * half)] == [
            pattern(cell, 20, CELL) for cell in range(2 * half)
        ]


def _run(works: list[Callable[[], Any]]) -> None:
    """Do all of these at once, each in a thread of its own, and wait for them."""
    ended: list[Callable[[], Any]] = []

    def noted(work: Callable[[], Any]) -> None:
        work()
        ended.append(work)

    threads = [threading.Thread(target=noted, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert len(ended) == len(works), "a thread has raised; what, is printed above"
