from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.errors import StateError
from umbp_core.pages import PageAllocator


def allocator(*pages_per_buffer: int) -> PageAllocator:
    return PageAllocator(10, [10 * pages for pages in pages_per_buffer])


def take(pages: PageAllocator, count: int) -> tuple[int, ...]:
    taken = pages.allocate(10 * count)
    assert taken is not None
    return taken


def test_the_rest_of_a_buffer_that_is_no_page_is_not_used() -> None:
    pages = PageAllocator(10, [19, 9, 0, 20])
    assert (pages.page_bytes, pages.total_pages, pages.free_pages) == (10, 3, 3)
    assert [pages.locate(page) for page in range(3)] == [(0, 0), (3, 0), (3, 1)]


def test_no_buffers_are_an_empty_tier() -> None:
    pages = PageAllocator(10, [])
    assert pages.total_pages == 0
    assert pages.allocate(1) is None


@pytest.mark.parametrize(("page_bytes", "buffers"), [(0, [10]), (-1, [10]), (10, [10, -1])])
def test_impossible_sizes_are_refused(page_bytes: int, buffers: list[int]) -> None:
    with pytest.raises(StateError):
        PageAllocator(page_bytes, buffers)


@given(st.integers(1, 10**15), st.integers(1, 10**9))
def test_the_last_page_may_be_filled_in_part(nbytes: int, page_bytes: int) -> None:
    count = PageAllocator(page_bytes, []).pages_for(nbytes)
    assert (count - 1) * page_bytes < nbytes <= count * page_bytes


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_object_without_bytes_has_no_pages(nbytes: int) -> None:
    pages = allocator(2)
    with pytest.raises(StateError, match=f"{nbytes} bytes"):
        pages.allocate(nbytes)
    assert pages.free_pages == 2


def test_a_run_in_a_later_buffer_is_better_than_pieces_of_an_earlier_one() -> None:
    pages = allocator(5, 3)
    pages.claim([1, 3])
    assert take(pages, 3) == (5, 6, 7)


def test_the_lowest_run_of_the_first_buffer_is_taken() -> None:
    pages = allocator(6, 6)
    pages.claim([0, 2])
    assert take(pages, 2) == (3, 4)


def test_a_run_does_not_cross_from_one_buffer_into_the_next() -> None:
    pages = allocator(2, 2)
    pages.claim([0, 3])
    assert take(pages, 2) == (1, 2)
    pages.free([1, 2, 3])
    assert take(pages, 2) == (2, 3)


def test_pieces_of_one_buffer_are_better_than_pieces_of_two() -> None:
    pages = allocator(2, 5)
    pages.claim([0, 3, 5])
    assert take(pages, 3) == (2, 4, 6)


def test_pieces_of_several_buffers_are_the_last_resort() -> None:
    pages = allocator(2, 1, 2)
    pages.claim([0, 4])
    assert take(pages, 3) == (1, 2, 3)
    assert pages.free_pages == 0


def test_too_few_pages_change_nothing() -> None:
    pages = allocator(2, 2)
    take(pages, 1)
    assert pages.allocate(40) is None
    assert pages.free_pages == 3
    assert len(take(pages, 3)) == 3


def test_free_counts_what_was_really_in_use() -> None:
    pages = allocator(4)
    taken = take(pages, 2)
    pages.claim([3])
    assert pages.free([*taken, *taken, 2, -1, 4]) == 2
    assert pages.free(taken) == 0
    assert pages.free_pages == 3


@pytest.mark.parametrize("claimed", [[1], [0, 1], [2, 2], [4], [-1], [3, 99]])
def test_a_claim_that_cannot_be_changes_nothing(claimed: list[int]) -> None:
    pages = allocator(4)
    pages.claim([1])
    with pytest.raises(StateError, match="cannot be claimed"):
        pages.claim(claimed)
    assert pages.free_pages == 3
    pages.claim([0, 2, 3])


@pytest.mark.parametrize("page", [-1, 4])
def test_a_page_that_does_not_exist_is_nowhere(page: int) -> None:
    with pytest.raises(StateError, match=f"page {page} does not exist"):
        allocator(4).locate(page)


def test_single_pages_are_all_found_again_after_many_were_freed() -> None:
    """More pages than the allocator remembers as freed, freed in an order that is not theirs."""
    pages = allocator(3000, 2000)
    first = [take(pages, 1)[0] for _ in range(5000)]
    assert sorted(first) == list(range(5000))
    assert pages.free([*range(4999, 0, -2), *range(0, 5000, 2)]) == 5000
    assert sorted(take(pages, 1)[0] for _ in range(5000)) == list(range(5000))
    assert pages.allocate(1) is None


def test_a_freed_page_that_a_run_took_is_not_given_again() -> None:
    pages = allocator(4)
    take(pages, 4)
    pages.free([3, 1, 2])
    assert take(pages, 2) == (1, 2)
    assert take(pages, 1) == (3,)
    assert pages.allocate(1) is None


def test_single_pages_for_many_are_those_that_single_calls_would_give() -> None:
    one, many = allocator(6, 4), allocator(6, 4)
    for pages in (one, many):
        pages.claim([0, 7])
        pages.free([7, 0, 7])
    assert many.allocate_each(9) == sorted(take(one, 1)[0] for _ in range(9))
    assert many.free_pages == one.free_pages == 1
    assert many.allocate_each(2) is None
    assert many.allocate_each(0) == []
    assert take(many, 1) == take(one, 1)


def test_pages_for_many_count_in_the_buffer_they_are_of() -> None:
    pages = allocator(3, 3)
    assert pages.allocate_each(2) == [0, 1]
    assert take(pages, 3) == (3, 4, 5), "the first buffer has no run of three any more"
