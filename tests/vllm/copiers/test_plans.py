"""How a batch is cut: runs of pages, system calls, parts of the staging memory, slices of an arena to lock."""

from __future__ import annotations

import itertools
import logging
import threading

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from umbp_core.errors import ConfigError
from umbp_vllm.block_views import word_of
from umbp_vllm.copier_cpu import CpuCopier
from umbp_vllm.copier_cuda import CudaCopier
from umbp_vllm.copiers import COPIERS, make_copier
from umbp_vllm.copy_plan import page_runs
from umbp_vllm.geometry import GroupGeometry, KvGeometry, Region, merged
from umbp_vllm.pinning import MAX_SLICE_BYTES, ArenaPinner, slices
from umbp_vllm.staging import batch_parts


@given(st.lists(st.integers(0, 30)), st.integers(1, 10))
def test_runs_cover_the_batch_in_order_and_cross_no_border(pages: list[int], slice_pages: int) -> None:
    runs = list(page_runs(np.asarray(pages, np.int64), slice_pages))
    covered = [(row + i, page + i) for row, page, count in runs for i in range(count)]
    assert covered == list(enumerate(pages))
    for _, page, count in runs:
        assert page // slice_pages == (page + count - 1) // slice_pages
    for (_, before, count), (_, after, _) in itertools.pairwise(runs):
        assert after != before + count or after % slice_pages == 0, "two runs that could have been one"


@given(st.integers(0, 100), st.integers(1, 20))
def test_parts_cover_a_batch_and_fit_the_staging_rows(count: int, rows: int) -> None:
    parts = list(batch_parts(count, rows))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert all(part.stop - part.start <= rows for part in parts)


@st.composite
def apart(draw: st.DrawFn) -> list[Region]:
    """Regions whose pieces do not overlap inside a block."""
    regions, offset = [], 0
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.sampled_from([8, 16]))
        pieces = draw(st.integers(1, 3))
        stride = size + draw(st.sampled_from([0, 0, 8]))
        regions.append(
            Region(draw(st.integers(0, 1)), offset, pieces, stride, draw(st.sampled_from([512, 1024])), size)
        )
        offset += pieces * stride + draw(st.sampled_from([0, 0, 8]))
    return regions


def bytes_of(regions: tuple[Region, ...] | list[Region], block: int) -> list[tuple[int, int]]:
    return [
        (region.storage, region.offset + piece * region.piece_stride + block * region.block_stride + byte)
        for region in regions
        for piece in range(region.pieces)
        for byte in range(region.piece_bytes)
    ]


@example([Region(0, 0, 1, 8, 512, 8), Region(0, 24, 2, 16, 512, 8)])
@example([Region(0, 0, 2, 8, 512, 8), Region(0, 24, 1, 8, 512, 8), Region(0, 32, 1, 8, 512, 8)])
@given(apart())
def test_merging_changes_no_byte_and_no_order_and_adds_no_piece(regions: list[Region]) -> None:
    result = merged(regions)
    for block in (0, 3):
        assert bytes_of(result, block) == bytes_of(regions, block)
    assert sum(r.pieces for r in result) <= sum(r.pieces for r in regions)
    assert merged(result) == result


def test_layers_at_equal_distances_become_one_region_and_touching_ones_one_piece() -> None:
    outer = [Region(0, 100 * layer, 1, 10, 10, 10) for layer in range(4)]
    assert merged(outer) == (Region(0, 0, 4, 100, 10, 10),)
    inner = [Region(0, 10 * layer, 1, 10, 40, 10) for layer in range(4)]
    assert merged(inner) == (Region(0, 0, 1, 40, 40, 40),)


@pytest.mark.parametrize(
    ("offset", "stride", "size", "word"), [(16, 64, 24, 8), (4, 64, 24, 4), (16, 66, 24, 2), (16, 64, 23, 1)]
)
def test_the_word_is_the_widest_that_divides_every_number(offset: int, stride: int, size: int, word: int) -> None:
    group = GroupGeometry(0, "mla", 16, (), (Region(0, offset, 2, size, stride, size),))
    assert word_of(group.regions, 4096)[0] == word
    assert word_of(group.regions, 4096)[1].itemsize == word
    assert word_of(group.regions, 4097)[0] == 1


class Driver:
    """Notes what is locked; refuses from call number ``refuse_at`` on; may wait before each call."""

    def __init__(self, refuse_at: int = 1000, gate: threading.Semaphore | None = None) -> None:
        self.locked: dict[int, int] = {}
        self.calls = 0
        self._refuse_at, self._gate = refuse_at, gate
        self.entered = threading.Event()

    def register(self, address: int, nbytes: int) -> int:
        self.entered.set()
        if self._gate is not None:
            assert self._gate.acquire(timeout=60)
        self.calls += 1
        if self.calls > self._refuse_at:
            return 2
        self.locked[address] = nbytes
        return 0

    def unregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_an_arena_is_locked_slice_by_slice_and_unlocked_whole() -> None:
    driver = Driver()
    pinner = ArenaPinner(driver, 4096, 1000, 300)
    pinner.start()
    assert pinner.wait(60)
    assert driver.locked == {4096: 300, 4396: 300, 4696: 300, 4996: 100}
    assert pinner.pinned_bytes == 1000
    pinner.close()
    pinner.close()
    assert driver.locked == {}


def test_locking_does_not_hold_up_the_start_and_a_close_ends_it_early() -> None:
    gate = threading.Semaphore(0)
    driver = Driver(refuse_at=10_000, gate=gate)
    pinner = ArenaPinner(driver, 0, 10_000, 1)
    pinner.start()
    assert driver.entered.wait(60)
    assert pinner.pinned_bytes == 0
    assert not pinner.wait(0)
    closing = threading.Thread(target=pinner.close)
    closing.start()
    for _ in range(5_000):
        gate.release()
        closing.join(0.01)
        if not closing.is_alive():
            break
    assert not closing.is_alive()
    assert driver.calls < 5_000
    assert driver.locked == {}


def test_a_refusal_of_the_driver_leaves_the_rest_unlocked_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(refuse_at=2)
    pinner = ArenaPinner(driver, 0, 1000, 300)
    # An engine that started earlier in this process has set the level of our loggers.
    with caplog.at_level(logging.WARNING, logger="umbp_vllm"):
        pinner.start()
        assert pinner.wait(60)
    assert pinner.pinned_bytes == 600
    assert set(driver.locked) == {0, 300}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ulimit -l" in caplog.text
    pinner.close()
    assert driver.locked == {}


def test_slices_add_up() -> None:
    assert list(slices(10, 4)) == [(0, 4), (4, 4), (8, 2)]
    assert list(slices(0, 4)) == []
    assert MAX_SLICE_BYTES == 16 * 2**30


class Pages:
    def __init__(self) -> None:
        self.array = np.zeros((2, 4096), np.uint8)
        self.address = self.array.ctypes.data


def geometry_on(device: str) -> KvGeometry:
    group = GroupGeometry(0, "mla", 16, ("a",), (Region(0, 0, 1, 64, 64, 64),))
    return KvGeometry(2, (group,), (torch.empty(128, dtype=torch.uint8, device=device),))


def test_the_copier_follows_the_device_of_the_kv_cache() -> None:
    assert isinstance(make_copier(geometry_on("cpu"), Pages()), CpuCopier)
    assert COPIERS["cuda"] is CudaCopier
    with pytest.raises(ConfigError, match="no copier for KV caches on 'meta' devices, only for cpu, cuda"):
        make_copier(geometry_on("meta"), Pages())


def test_an_opened_and_closed_copier_on_the_cpu_has_no_fence() -> None:
    copier = make_copier(geometry_on("cpu"), Pages())
    copier.open()
    assert copier.fence() is None
    copier.close()
    copier.close()


def test_regions_outside_their_allocation_are_refused() -> None:
    group = GroupGeometry(0, "mla", 16, ("a",), (Region(0, 0, 1, 64, 64, 64),))
    with pytest.raises(ConfigError, match=r"KV group 0: .* does not fit its allocation of 127 bytes with 2 blocks"):
        KvGeometry(2, (group,), (torch.empty(127, dtype=torch.uint8),))


def test_an_arena_page_holds_the_largest_object_and_is_a_multiple_of_4096() -> None:
    def of(*sizes: int) -> int:
        groups = tuple(
            GroupGeometry(i, "mla", 16, (), (Region(0, 0, 1, size, size, size),) if size else ())
            for i, size in enumerate(sizes)
        )
        return KvGeometry(1, groups, (torch.empty(10_000, dtype=torch.uint8),)).page_bytes

    assert [of(1), of(4096), of(4097), of(10, 9000, 0), of(0)] == [4096, 4096, 8192, 12288, 4096]
