"""Gather and scatter against a copy byte by byte, on random geometries: the CPU copier and the staged copies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umbp_connectors.pool.arena import Arena
from umbp_core.errors import ConfigError, StateError, TransferError
from umbp_vllm import bands
from umbp_vllm.copier_cpu import SERIAL_WORDS, CpuCopier
from umbp_vllm.copy_plan import checked_batch
from umbp_vllm.geometry import GroupGeometry, KvGeometry, LayerPages, Region, merged
from umbp_vllm.staging import StagedCopies

EXAMPLES = settings(max_examples=150, deadline=None)


class Pages:
    """An arena as the copiers see one."""

    def __init__(self, pages: int, page_bytes: int) -> None:
        self.array = np.zeros((pages, page_bytes), np.uint8)
        self.address = self.array.ctypes.data


class StagedCopier:
    """``StagedCopies`` as a copier on the CPU: what the CUDA copier issues on its streams, without any."""

    def __init__(self, geometry: KvGeometry, arena: Pages, rows: int = 2, slice_pages: int = 3) -> None:
        self._geometry, self._arena = geometry, arena
        self._staging = torch.zeros((rows, arena.array.shape[1]), dtype=torch.uint8)
        self._copies = StagedCopies(geometry, torch.from_numpy(arena.array), slice_pages)

    def gather(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        b, p = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        self._copies.gather(group, b, p, torch.from_numpy(b), self._staging)

    def scatter(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        b, p = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        self._copies.scatter(group, b, p, torch.from_numpy(b), self._staging)

    def bands(self, group: int) -> int:
        return self._copies.bands(group)

    def band_layers(self, group: int, band: int) -> Sequence[str]:
        return self._copies.band_layers(group, band)

    def gather_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        b, p = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        self._copies.gather_band(group, band, b, p, torch.from_numpy(b), self._staging)

    def scatter_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        b, p = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        self._copies.scatter_band(group, band, b, p, torch.from_numpy(b), self._staging)


def opened(geometry: KvGeometry, arena: Pages) -> CpuCopier:
    copier = CpuCopier(geometry, arena)
    copier.open()
    return copier


COPIERS: dict[str, Callable[[KvGeometry, Pages], CpuCopier | StagedCopier]] = {
    "cpu": opened,
    "staged": StagedCopier,
}
every_copier = pytest.mark.parametrize("make", COPIERS.values(), ids=COPIERS.keys())


@st.composite
def region_runs(draw: st.DrawFn, storage: int, offset: int, blocks: int) -> list[Region]:
    """Layers of one shape in one of the engine's layouts, with padding between pages, layers and blocks."""
    unit = draw(st.sampled_from([1, 2, 8, 64]))
    layers = draw(st.integers(1, 4))
    page = unit * draw(st.integers(1, 9))
    pad = unit * draw(st.integers(0, 2))
    if draw(st.booleans()):  # blocks outermost
        layer_stride, block_stride = page + pad, layers * (page + pad) + unit * draw(st.integers(0, 2))
    else:  # layers outermost
        block_stride = page + pad
        layer_stride = blocks * block_stride + pad
    return [Region(storage, offset + i * layer_stride, 1, page, block_stride, page) for i in range(layers)]


@st.composite
def geometries(draw: st.DrawFn) -> KvGeometry:
    """One to three groups over one or two storages; groups may lie over each other, pieces of a group do not."""
    blocks = draw(st.integers(1, 6))
    count = draw(st.integers(1, 2))
    groups, sizes = [], [8] * count
    for index in range(draw(st.integers(1, 3))):
        used = [draw(st.sampled_from([0, 0, 8, 3])) for _ in range(count)]
        regions: list[Region] = []
        for _ in range(draw(st.integers(1, 3))):
            storage = draw(st.integers(0, count - 1))
            added = draw(region_runs(storage, used[storage], blocks))
            used[storage] = max(region.end(blocks) for region in added)
            regions += added
        sizes = [max(size, end) for size, end in zip(sizes, used, strict=True)]
        layers = tuple(f"{index}.{number}" for number in range(len(regions)))
        own = tuple(LayerPages((layer,), (region,)) for layer, region in zip(layers, regions, strict=True))
        groups.append(GroupGeometry(index, "full_attention", 16, layers, merged(regions), layer_pages=own))
    storages = tuple(torch.zeros(size + draw(st.integers(0, 5)), dtype=torch.uint8) for size in sizes)
    return KvGeometry(blocks, tuple(groups), storages)


@dataclass
class Reference:
    """What the copies must do, one byte after the other, on copies of all memory."""

    geometry: KvGeometry
    storages: list[np.ndarray]
    pages: np.ndarray

    @classmethod
    def of(cls, geometry: KvGeometry, arena: Pages) -> Reference:
        return cls(geometry, [storage.numpy().copy() for storage in geometry.storages], arena.array.copy())

    def places(self, group: int, block: int) -> list[tuple[int, int]]:
        """(storage, byte) of every byte of an object, in order."""
        return [
            (region.storage, region.offset + piece * region.piece_stride + block * region.block_stride + byte)
            for region in self.geometry.groups[group].regions
            for piece in range(region.pieces)
            for byte in range(region.piece_bytes)
        ]

    def gather(self, group: int, blocks: Sequence[int], pages: Sequence[int]) -> None:
        for block, page in zip(blocks, pages, strict=True):
            for at, (storage, byte) in enumerate(self.places(group, block)):
                self.pages[page, at] = self.storages[storage][byte]

    def scatter(self, group: int, blocks: Sequence[int], pages: Sequence[int]) -> None:
        for block, page in zip(blocks, pages, strict=True):
            for at, (storage, byte) in enumerate(self.places(group, block)):
                self.storages[storage][byte] = self.pages[page, at]

    def check(self, arena: Pages) -> None:
        for storage, expected in zip(self.geometry.storages, self.storages, strict=True):
            np.testing.assert_array_equal(storage.numpy(), expected)
        largest = max(group.object_bytes for group in self.geometry.groups)
        np.testing.assert_array_equal(arena.array[:, :largest], self.pages[:, :largest])


def fill(geometry: KvGeometry, arena: Pages, seed: int) -> None:
    random = np.random.default_rng(seed)
    for storage in geometry.storages:
        storage.numpy()[:] = random.integers(0, 256, storage.numel(), np.uint8)
    largest = max(group.object_bytes for group in geometry.groups)
    arena.array[:, :largest] = random.integers(0, 256, (arena.array.shape[0], largest), np.uint8)


@every_copier
@EXAMPLES
@given(data=st.data(), geometry=geometries())
def test_any_sequence_of_copies_moves_exactly_the_right_bytes(
    make: Callable[[KvGeometry, Pages], CpuCopier | StagedCopier], data: st.DataObject, geometry: KvGeometry
) -> None:
    arena = Pages(data.draw(st.integers(1, 8)), geometry.page_bytes)
    copier = make(geometry, arena)
    fill(geometry, arena, data.draw(st.integers(0, 9)))
    reference = Reference.of(geometry, arena)
    for _ in range(data.draw(st.integers(1, 4))):
        group = data.draw(st.integers(0, len(geometry.groups) - 1))
        blocks = st.integers(0, geometry.num_blocks - 1)
        pages = st.integers(0, arena.array.shape[0] - 1)
        if data.draw(st.booleans()):
            to = data.draw(st.lists(pages, unique=True))
            sources = data.draw(st.lists(blocks, min_size=len(to), max_size=len(to)))
            copier.gather(group, sources, to, None)
            rest = {page: reference.pages[page].copy() for page in to}
            reference.gather(group, sources, to)
            size = geometry.object_bytes(group)
            for page in rest:  # what follows the object in its own page is nobody's
                reference.pages[page, size:] = arena.array[page, size:]
        else:
            to = data.draw(st.lists(blocks, unique=True))
            sources = data.draw(st.lists(pages, min_size=len(to), max_size=len(to)))
            copier.scatter(group, to, sources, None)
            reference.scatter(group, to, sources)
        reference.check(arena)


@every_copier
@EXAMPLES
@given(data=st.data(), geometry=geometries(), least_bytes=st.sampled_from([1, 40, 10_000]))
def test_bands_move_their_layers_one_after_the_other_and_touch_no_other(
    make: Callable[[KvGeometry, Pages], CpuCopier | StagedCopier],
    data: st.DataObject,
    geometry: KvGeometry,
    least_bytes: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "BAND_BYTES", least_bytes)
        arena = Pages(data.draw(st.integers(1, 8)), geometry.page_bytes)
        copier = make(geometry, arena)
        fill(geometry, arena, data.draw(st.integers(0, 9)))
        reference = Reference.of(geometry, arena)
        group = data.draw(st.sampled_from(geometry.groups))
        to = data.draw(st.lists(st.integers(0, geometry.num_blocks - 1), unique=True))
        pages = st.integers(0, arena.array.shape[0] - 1)
        sources = data.draw(st.lists(pages, min_size=len(to), max_size=len(to)))
        stored = dict(zip(data.draw(st.permutations(range(arena.array.shape[0]))), to, strict=False))
        own = bands.bands_of(group)
        assert copier.bands(group.index) == len(own)
        assert [layer for band in own for layer in band.layers] == list(group.layers)
        needed = bands.bands_needed(geometry)
        for number, band in enumerate(own):
            assert {needed[layer] for layer in band.layers} == {number + 1}
            assert tuple(copier.band_layers(group.index, number)) == band.layers
            copier.scatter_band(group.index, number, to, sources, None)
            copier.gather_band(group.index, number, list(stored.values()), list(stored), None)
            end = band.in_object + sum(region.nbytes for region in band.regions)
            for block, page in zip(to, sources, strict=True):
                for at, (storage, byte) in enumerate(reference.places(group.index, block)):
                    if band.in_object <= at < end:
                        reference.storages[storage][byte] = reference.pages[page, at]
            for page, block in stored.items():
                for at, (storage, byte) in enumerate(reference.places(group.index, block)):
                    if band.in_object <= at < end:
                        reference.pages[page, at] = reference.storages[storage][byte]
            reference.check(arena)


def two_layers(blocks: int = 4, page: int = 64) -> KvGeometry:
    regions = merged([Region(0, layer * blocks * page, 1, page, page, page) for layer in range(2)])
    return KvGeometry(
        blocks,
        (GroupGeometry(0, "full_attention", 16, ("a", "b"), regions),),
        (torch.zeros(2 * blocks * page, dtype=torch.uint8),),
    )


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize(
    ("group", "blocks", "pages", "message"),
    [
        (0, [0, 4], [0, 1], "block 4 does not exist"),
        (0, [0, -1], [0, 1], "block -1 does not exist"),
        (0, [0, 1], [0, 3], "arena page 3 does not exist"),
        (0, [0, 1], [-1, 0], "arena page -1 does not exist"),
        (0, [0, 1], [0], "2 blocks cannot be copied to or from 1 pages"),
        (1, [0], [0], "KV group 1 does not exist"),
        (-1, [0], [0], "KV group -1 does not exist"),
    ],
)
def test_a_batch_with_a_wrong_number_moves_nothing(
    direction: str, group: int, blocks: list[int], pages: list[int], message: str
) -> None:
    geometry = two_layers()
    arena = Pages(3, geometry.page_bytes)
    fill(geometry, arena, 1)
    reference = Reference.of(geometry, arena)
    copier = opened(geometry, arena)
    move = {"gather": copier.gather, "scatter": copier.scatter}[direction]
    with pytest.raises(TransferError, match=message):
        move(group, blocks, pages, None)
    reference.check(arena)


def test_two_copies_to_one_place_are_refused_and_move_nothing() -> None:
    geometry = two_layers()
    arena = Pages(3, geometry.page_bytes)
    fill(geometry, arena, 1)
    reference = Reference.of(geometry, arena)
    copier = opened(geometry, arena)
    with pytest.raises(TransferError, match="arena page 2 is the destination of two"):
        copier.gather(0, [0, 1], [2, 2], None)
    with pytest.raises(TransferError, match="block 3 is the destination of two"):
        copier.scatter(0, [3, 3], [0, 1], None)
    reference.check(arena)


def test_an_arena_with_smaller_pages_than_an_object_is_refused() -> None:
    geometry = two_layers(page=64)
    with pytest.raises(ConfigError, match="128 bytes and an arena page 100"):
        CpuCopier(geometry, Pages(3, 100)).open()


def test_a_copier_copies_only_between_open_and_close() -> None:
    geometry = two_layers()
    arena = Pages(3, geometry.page_bytes)
    copier = CpuCopier(geometry, arena)
    with pytest.raises(StateError, match="not open"):
        copier.gather(0, [0], [0], None)
    copier.open()
    copier.gather(0, [0], [0], None)
    copier.close()
    copier.close()
    with pytest.raises(StateError, match="not open"):
        copier.scatter(0, [0], [0], None)


@every_copier
def test_a_pipeline_stage_without_layers_of_a_group_moves_nothing_for_it(
    make: Callable[[KvGeometry, Pages], CpuCopier | StagedCopier],
) -> None:
    with_layers = two_layers()
    empty = GroupGeometry(1, "no_layers", 16, (), ())
    geometry = KvGeometry(with_layers.num_blocks, (*with_layers.groups, empty), with_layers.storages)
    arena = Pages(3, geometry.page_bytes)
    fill(geometry, arena, 1)
    reference = Reference.of(geometry, arena)
    copier = make(geometry, arena)
    copier.gather(1, [0, 1], [1, 2], None)
    copier.scatter(1, [0, 1], [1, 2], None)
    for storage, expected in zip(geometry.storages, reference.storages, strict=True):
        np.testing.assert_array_equal(storage.numpy(), expected)
    assert geometry.object_bytes(1) == 0


@every_copier
@pytest.mark.parametrize("layers", [1, 3])
def test_pieces_longer_than_torch_copies_in_one_thread(
    make: Callable[[KvGeometry, Pages], CpuCopier | StagedCopier], layers: int
) -> None:
    page = 8 * SERIAL_WORDS + 24
    regions = merged([Region(0, layer * (page + 8), 1, page, layers * (page + 8), page) for layer in range(layers)])
    storage = torch.zeros(3 * layers * (page + 8), dtype=torch.uint8)
    geometry = KvGeometry(3, (GroupGeometry(0, "mla", 16, (), regions),), (storage,))
    arena = Pages(2, geometry.page_bytes)
    fill(geometry, arena, 4)
    objects = [storage.view(3, layers, page + 8)[block, :, :page].reshape(-1).numpy() for block in (2, 0)]
    make(geometry, arena).gather(0, [2, 0], [0, 1], None)
    for at, expected in enumerate(objects):
        np.testing.assert_array_equal(arena.array[at, : layers * page], expected)
    make(geometry, arena).scatter(0, [1, 2], [1, 0], None)
    written = storage.view(3, layers, page + 8)[:, :, :page].reshape(3, -1).numpy()
    np.testing.assert_array_equal(written[1], written[0])
    np.testing.assert_array_equal(written[2], objects[0])


COUNT_THREADS = """
import threading
from pathlib import Path
import numpy as np, torch
from umbp_vllm.copier_cpu import CpuCopier
from umbp_vllm.geometry import GroupGeometry, KvGeometry, Region

def threads():
    return len(list(Path("/proc/self/task").iterdir()))

class Pages:
    array = np.zeros((4, 8 << 20), np.uint8)
    address = array.ctypes.data

(torch.ones(1 << 20) + 1).sum()  # the model's own pool
regions = (Region(0, 0, 2, 4 << 20, 1 << 20, 1 << 20), Region(0, 8 << 20, 1, 4 << 20, 4 << 20, 4 << 20))
storage = torch.zeros(32 << 20, dtype=torch.uint8)
geometry = KvGeometry(4, (GroupGeometry(0, "mla", 16, (), regions),), (storage,))
before, during = threads(), []

def copy():
    copier = CpuCopier(geometry, Pages())
    copier.open()
    copier.gather(0, [0, 1, 2, 3], [0, 1, 2, 3], None)
    copier.scatter(0, [0, 1, 2, 3], [0, 1, 2, 3], None)
    during.append(threads() - 1)
    storage.view(torch.int64).copy_(torch.ones(4 << 20, dtype=torch.int64))
    during.append(threads() - 1)

thread = threading.Thread(target=copy)
thread.start()
thread.join(60)
print(*[count - before for count in during])
"""


def test_copying_in_a_transfer_thread_starts_no_pool_of_threads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS],
        env={**os.environ, "OMP_NUM_THREADS": "4", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    by_copier, by_one_large_copy = map(int, done.stdout.split())
    assert by_copier == 0
    assert by_one_large_copy > 0 or os.cpu_count() == 1, "the large copy shows that a pool would have been noticed"


def test_inference_tensors_can_be_written_from_a_thread_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        geometry = two_layers()
        arena = Pages(1, geometry.page_bytes)
        copier = opened(geometry, arena)
    arena.array[:] = 7
    copier.scatter(0, [1], [0], None)
    assert geometry.storages[0].sum() == 7 * geometry.object_bytes(0)


def test_a_copier_that_torch_refuses_reports_a_failed_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of luck")

    geometry = two_layers()
    copier = opened(geometry, Pages(1, geometry.page_bytes))
    monkeypatch.setattr(torch, "_foreach_copy_", refuse)
    with pytest.raises(TransferError, match="copying 1 pieces of KV failed: out of luck"):
        copier.gather(0, [1], [0], None)


def test_the_pools_own_arena_is_what_a_copier_takes() -> None:
    geometry = two_layers()
    arena = Arena(geometry.page_bytes, pages=2, staging_pages=1, prefault=False)
    arena.open()
    copier = CpuCopier(geometry, arena)
    copier.open()
    geometry.storages[0].copy_(torch.arange(geometry.storages[0].numel()))
    copier.gather(0, [1, 3], [0, 2], None)
    geometry.storages[0].zero_()
    copier.scatter(0, [0, 2], [2, 0], None)
    expected = np.concatenate([np.arange(start, start + 64) for start in (192, 448)]).astype(np.uint8)
    assert bytes(arena.page(2, 128)) == expected.tobytes()
    written = geometry.storages[0].view(2, 4, 64).transpose(0, 1).reshape(4, 128).numpy()
    np.testing.assert_array_equal(written[0], expected)
    assert not written[1].any()
    copier.close()
    arena.close()
