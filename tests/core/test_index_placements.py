"""Cells, masks and rosters: what the indexes are made of."""

from __future__ import annotations

import random

import pytest

from umbp_core.placements import Cell, Placements, Roster, preference


@pytest.fixture
def placements() -> Placements[Cell]:
    return Placements(Cell)


def test_the_fastest_tier_comes_first_and_unknown_last() -> None:
    assert sorted([0, 7, 3, -1, 2, 1], key=preference) == [1, 2, 3, 7, 0, -1]


def test_a_cell_counts_until_it_is_retired(placements: Placements[Cell]) -> None:
    one, other = placements.open("n", 2), placements.open("n", 1)
    assert placements.open("n", 2) is one
    assert placements.cells("n") == [other, one]
    assert placements.live == one.bit | other.bit
    placements.retire(one)
    assert placements.cells("n") == [other]
    assert placements.members(one.bit | other.bit) == [other]
    assert (placements.is_live(one), placements.is_live(other)) == (False, True)


def test_a_number_is_given_again_only_after_its_release(placements: Placements[Cell]) -> None:
    first = placements.open("n", 1)
    placements.retire(first)
    second = placements.open("n", 1)
    assert second.number != first.number
    placements.release(first)
    assert placements.open("m", 1).number == first.number
    assert placements.open("m", 2).number == 2


def test_the_lowest_free_number_is_given_first(placements: Placements[Cell]) -> None:
    cells = [placements.open("n", tier) for tier in range(5)]
    for cell in (cells[3], cells[1], cells[2]):
        placements.retire(cell)
        placements.release(cell)
    assert [placements.open("m", tier).number for tier in range(4)] == [1, 2, 3, 5]


def test_a_prepared_cell_does_not_count(placements: Placements[Cell]) -> None:
    cell = placements.prepare("n", 1)
    assert (placements.cell("n", 1), placements.live, placements.nodes()) == (None, 0, [])
    placements.admit(cell)
    assert (placements.cell("n", 1), placements.live) == (cell, cell.bit)


def test_a_node_without_cells_is_forgotten(placements: Placements[Cell]) -> None:
    placements.open("a", 1)
    cell = placements.open("b", 1)
    placements.open("c", 1)
    placements.retire(cell)
    assert placements.nodes() == ["a", "c"]
    placements.open("b", 1)
    assert placements.nodes() == ["a", "c", "b"]


def test_equal_masks_are_one_object(placements: Placements[Cell]) -> None:
    assert placements.intern(1 << 100) is placements.intern(1 << 100)


def test_the_masks_that_are_kept_for_sharing_are_bounded(placements: Placements[Cell]) -> None:
    first = placements.intern(1 << 100)
    for number in range(1 << 16):
        placements.intern(number << 200)
    assert placements.intern(1 << 100) == first
    assert placements.intern(1 << 100) is not first


@pytest.mark.parametrize("seed", range(20))
def test_a_roster_holds_what_a_set_would_in_not_much_more_than_its_size(seed: int) -> None:
    choice = random.Random(seed)
    roster, model = Roster(), set[int]()
    for _ in range(300):
        if choice.random() < 0.5:
            rows = choice.sample(range(400), choice.randrange(1, 40))
            new = [row for row in rows if row not in model]
            roster.add(new)
            model.update(new)
        else:
            gone = choice.sample(sorted(model), min(len(model), choice.randrange(1, 40)))
            roster.remove(gone)
            model.difference_update(gone)
        assert len(roster) == len(model)
        copied = list(roster.copy())
        assert len(copied) == len(set(copied)) == roster.log_length
        assert model <= set(copied)


def test_a_roster_forgets_what_was_removed() -> None:
    roster = Roster()
    roster.add(list(range(10_000)))
    for start in range(0, 9_000, 100):
        roster.remove(list(range(start, start + 100)))
    assert len(roster) == 1_000
    assert roster.log_length < 4_000


def test_a_roster_is_taken_apart_in_slices() -> None:
    roster = Roster()
    roster.add([5, 6, 7, 8, 9])
    taken = []
    while roster.log_length:
        part = roster.take(2)
        assert len(part) <= 2
        taken += part
    assert sorted(taken) == [5, 6, 7, 8, 9]
    assert list(roster.take(2)) == []
