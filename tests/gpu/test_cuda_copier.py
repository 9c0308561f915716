"""The CUDA copier on a GPU: right bytes, never before the fence, and nobody of the engine waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from umbp_vllm.copier_cuda import CudaCopier
from umbp_vllm.geometry import GroupGeometry, KvGeometry, Region, merged

pytestmark = pytest.mark.gpu

BLOCKS = 24
LAYERS = 5
PAGE = 32 << 10
DEVICE = "cuda:0"
POISON = 0xEE
LONG = 200_000_000
"""Cycles: about a tenth of a second on the device."""


class Pages:
    """Pageable host memory, as an arena's is before it is locked; perhaps with pages of other ranks between."""

    def __init__(self, pages: int, page_bytes: int, ranks: int = 1) -> None:
        self._raw = np.zeros(pages * ranks * page_bytes + 4096, np.uint8)
        start = -self._raw.ctypes.data % 4096
        self.whole = self._raw[start : start + pages * ranks * page_bytes].reshape(pages, ranks, page_bytes)
        self.array = self.whole[:, ranks - 1]
        self.address = self.array.ctypes.data
        self.span = ((pages - 1) * ranks + 1) * page_bytes


def layers_outermost(page: int = PAGE, pad: int = 0) -> list[Region]:
    stride = page + pad
    return [Region(0, layer * BLOCKS * stride, 1, page, stride, page) for layer in range(LAYERS)]


def blocks_outermost(page: int = PAGE, pad: int = 0) -> list[Region]:
    return [Region(0, layer * page, 1, page, LAYERS * page + pad, page) for layer in range(LAYERS)]


def heads_outermost() -> list[Region]:
    """LHBNC: two head slices per page, all blocks of one slice together."""
    piece = PAGE // 2
    return [Region(0, layer * BLOCKS * PAGE, 2, BLOCKS * piece, piece, piece) for layer in range(LAYERS)]


def two_shapes() -> list[Region]:
    """A block with layers of two sizes, side by side and padded at its end."""
    stride = 3 * PAGE + 3 * 520 + 40
    large = [Region(0, layer * PAGE, 1, PAGE, stride, PAGE) for layer in range(3)]
    return large + [Region(0, 3 * PAGE + layer * 520 + 8, 1, 512, stride, 512) for layer in range(3)]


LAYOUTS = {
    "layers outermost": layers_outermost(),
    "layers outermost, padded pages": layers_outermost(pad=512),
    "layers outermost, odd pages": layers_outermost(page=1001),
    "blocks outermost": blocks_outermost(),
    "blocks outermost, padded blocks": blocks_outermost(pad=512),
    "heads outermost": heads_outermost(),
    "two shapes": two_shapes(),
}


def geometry_of(regions: list[Region]) -> KvGeometry:
    size = max(region.end(BLOCKS) for region in regions)
    group = GroupGeometry(0, "full_attention", 16, (), merged(regions))
    return KvGeometry(BLOCKS, (group,), (torch.zeros(size, dtype=torch.uint8, device=DEVICE),))


def object_of(geometry: KvGeometry, kv: torch.Tensor, block: int) -> torch.Tensor:
    """One block's bytes, read piece by piece from a host copy of the KV cache."""
    pieces = []
    for region in geometry.groups[0].regions:
        for piece in range(region.pieces):
            start = region.offset + piece * region.piece_stride + block * region.block_stride
            pieces.append(kv[start : start + region.piece_bytes])
    return torch.cat(pieces)


def randomise(geometry: KvGeometry) -> torch.Tensor:
    """Random KV on the device; returns it on the host."""
    kv = geometry.storages[0]
    kv.random_(0, 256)
    torch.cuda.synchronize()
    return kv.cpu()


class Rig:
    """A geometry, an arena and an open copier."""

    def __init__(self, regions: list[Region], pages: int = 40, ranks: int = 1, **options: int) -> None:
        self.geometry = geometry_of(regions)
        self.arena = Pages(pages, self.geometry.page_bytes, ranks)
        self.copier = CudaCopier(self.geometry, self.arena, **options)
        self.copier.open()

    def page(self, page: int) -> torch.Tensor:
        return torch.from_numpy(self.arena.array[page, : self.geometry.object_bytes(0)])


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Transfer threads."""
    with ThreadPoolExecutor(4) as threads:
        yield threads


def wait_until_locked(copier: CudaCopier) -> None:
    assert copier._pinner is not None
    assert copier._pinner.wait(120)


@pytest.mark.parametrize("ranks", [1, 3], ids=["alone", "between others"])
@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("regions", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_blocks_go_to_the_arena_and_back_bit_by_bit(regions: list[Region], ranks: int, *, locked: bool) -> None:
    page_bytes = geometry_of(regions).page_bytes
    rig = Rig(regions, ranks=ranks, staging_bytes=8 * page_bytes, pin_slice_bytes=7 * page_bytes)
    random = np.random.default_rng(3)
    if locked:
        rig.copier.gather(0, [0], [0], rig.copier.fence())
        wait_until_locked(rig.copier)
        assert rig.copier.pinned_bytes == rig.arena.span
    for pages in (random.permutation(40)[:20], np.arange(5, 25)):
        before = randomise(rig.geometry)
        blocks = random.permutation(BLOCKS)[:20]
        rig.copier.gather(0, blocks.tolist(), pages.tolist(), rig.copier.fence())
        for block, page in zip(blocks, pages, strict=True):
            assert torch.equal(rig.page(page), object_of(rig.geometry, before, block))
        middle = randomise(rig.geometry)
        targets = random.permutation(BLOCKS)[:20]
        rig.copier.scatter(0, targets.tolist(), pages.tolist(), rig.copier.fence())
        after = rig.geometry.storages[0].cpu()
        for target, block in zip(targets, blocks, strict=True):
            assert torch.equal(object_of(rig.geometry, after, target), object_of(rig.geometry, before, block))
        for block in set(range(BLOCKS)) - set(targets.tolist()):
            assert torch.equal(object_of(rig.geometry, after, block), object_of(rig.geometry, middle, block))
    assert not rig.arena.whole[:, : ranks - 1].any()
    rig.copier.close()


@pytest.mark.statement("connector", 40)
@pytest.mark.parametrize("regions", [layers_outermost(), blocks_outermost()], ids=["staged", "direct"])
def test_a_store_never_reads_before_the_step_that_writes_has_ended(
    regions: list[Region], pool: ThreadPoolExecutor
) -> None:
    rig = Rig(regions)
    kv = rig.geometry.storages[0]
    step = torch.cuda.Stream()
    rig.copier.gather(0, [0], [0], rig.copier.fence())
    for number in range(1, 6):
        kv.fill_(POISON)
        torch.cuda.synchronize()
        with torch.cuda.stream(step):
            torch.cuda._sleep(LONG)
            kv.fill_(number)
            fence = rig.copier.fence()
        stored = pool.submit(rig.copier.gather, 0, list(range(BLOCKS)), list(range(BLOCKS)), fence)
        stored.result(60)
        for page in range(BLOCKS):
            assert (rig.page(page) == number).all(), "poison was stored"
    rig.copier.close()


def test_a_load_never_writes_before_the_step_that_reads_has_ended(pool: ThreadPoolExecutor) -> None:
    rig = Rig(layers_outermost())
    kv = rig.geometry.storages[0]
    rig.arena.array[:] = POISON
    kv.fill_(1)
    torch.cuda.synchronize()
    step = torch.cuda.Stream()
    with torch.cuda.stream(step):
        torch.cuda._sleep(LONG)
        seen = kv.clone()
        fence = rig.copier.fence()
    pool.submit(rig.copier.scatter, 0, list(range(BLOCKS)), list(range(BLOCKS)), fence).result(60)
    torch.cuda.synchronize()
    assert (seen == 1).all()
    assert (kv == POISON).all()
    rig.copier.close()


def test_a_load_does_not_wait_for_a_store_that_waits_for_its_step(pool: ThreadPoolExecutor) -> None:
    rig = Rig(layers_outermost())
    rig.copier.scatter(0, [3], [3], rig.copier.fence())
    early = rig.copier.fence()
    step = torch.cuda.Stream()
    with torch.cuda.stream(step):
        torch.cuda._sleep(10 * LONG)
        late = rig.copier.fence()
    store: Future[None] = pool.submit(rig.copier.gather, 0, [1], [1], late)
    pool.submit(rig.copier.scatter, 0, [2], [2], early).result(60)
    assert not late.query(), "the load ended only with the step"
    store.result(60)
    assert late.query()
    rig.copier.close()


def test_copies_leave_the_streams_of_the_engine_alone(pool: ThreadPoolExecutor) -> None:
    rig = Rig(layers_outermost())
    rig.copier.gather(0, [0], [0], rig.copier.fence())
    fence = rig.copier.fence()
    fence.synchronize()
    torch.cuda._sleep(10 * LONG)
    default = torch.cuda.Event()
    default.record()
    pool.submit(rig.copier.gather, 0, list(range(20)), list(range(20)), fence).result(60)
    assert not default.query(), "the copy waited for the default stream, or the default stream for it"
    torch.cuda.synchronize()
    rig.copier.close()


@pytest.mark.statement("connector", 41)
def test_a_fence_costs_the_forward_thread_microseconds_while_work_is_pending(pool: ThreadPoolExecutor) -> None:
    rig = Rig(layers_outermost())
    for _ in range(50):
        rig.copier.fence()
    torch.cuda._sleep(10 * LONG)
    store = pool.submit(rig.copier.gather, 0, list(range(20)), list(range(20)), rig.copier.fence())
    seconds = []
    for _ in range(1000):
        begin = time.perf_counter()
        rig.copier.fence()
        seconds.append(time.perf_counter() - begin)
    assert not store.done(), "nothing was pending"
    store.result(60)
    assert float(np.percentile(seconds, 99)) < 50e-6
    rig.copier.close()


def test_many_threads_store_and_load_at_once_while_the_arena_is_being_locked(pool: ThreadPoolExecutor) -> None:
    page_bytes = geometry_of(layers_outermost()).page_bytes
    rig = Rig(layers_outermost(), pages=400, staging_bytes=8 * page_bytes, pin_slice_bytes=3 * page_bytes)
    before = randomise(rig.geometry)
    fence = rig.copier.fence()
    start = threading.Barrier(4, timeout=60)

    def store(number: int) -> None:
        start.wait()
        for turn in range(5):
            first = 100 * number + 20 * turn
            rig.copier.gather(0, list(range(20)), list(range(first, first + 20)), fence)

    for stored in [pool.submit(store, number) for number in range(4)]:
        stored.result(120)
    for page in range(400):
        assert torch.equal(rig.page(page), object_of(rig.geometry, before, page % 20))
    rig.copier.close()
    assert rig.copier.pinned_bytes == 0


def test_an_arena_can_be_locked_again_after_close() -> None:
    rig = Rig(layers_outermost())
    for _ in range(2):
        rig.copier.open()
        rig.copier.gather(0, [0], [0], rig.copier.fence())
        wait_until_locked(rig.copier)
        assert rig.copier.pinned_bytes == rig.arena.array.nbytes
        rig.copier.close()
