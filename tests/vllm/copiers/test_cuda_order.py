"""What the CUDA copier asks of the driver, in which order: a recording runtime over CPU tensors.

That a GPU does what it is asked is proven by ``tests/gpu``, where there is one.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from umbp_core.errors import ConfigError, StateError, TransferError
from umbp_vllm import pinning
from umbp_vllm.copier_cuda import CudaCopier
from umbp_vllm.device_runtime import TorchCuda
from umbp_vllm.geometry import GroupGeometry, KvGeometry, Region, merged
from umbp_vllm.staging import StagedCopies

BLOCKS, PAGE = 6, 64


class Pages:
    def __init__(self, pages: int, page_bytes: int = 4096) -> None:
        self.array = np.zeros((pages, page_bytes), np.uint8)
        self.address = self.array.ctypes.data


@dataclass
class Recorder:
    """A device runtime that writes down each call; copies happen at once."""

    calls: list[tuple[object, ...]] = field(default_factory=list)
    fail: dict[str, Exception] = field(default_factory=dict)
    waiting: Callable[[], None] = lambda: None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def note(self, name: str, *arguments: object) -> None:
        self.calls.append((name, *arguments))
        if name in self.fail:
            raise self.fail[name]

    def new_stream(self) -> object:
        stream = f"stream {next(self.numbers)}"
        self.note("new_stream", stream)
        return stream

    @contextmanager
    def on(self, stream: object) -> Iterator[None]:
        self.note("on", stream)
        yield
        self.note("off", stream)

    def upload(self, numbers: torch.Tensor) -> torch.Tensor:
        self.note("upload", numbers.tolist())
        return numbers.clone()

    def mark(self, stream: object) -> object:
        self.note("mark", stream)
        return f"end of {stream}"

    def mark_current(self) -> object:
        self.note("mark_current")
        return "the step"

    def order_after(self, stream: object, mark: object) -> None:
        self.note("order_after", stream, mark)

    def wait(self, mark: object) -> None:
        self.note("wait", mark)
        self.waiting()

    def drain(self, stream: object) -> None:
        self.note("drain", stream)

    def register(self, address: int, nbytes: int) -> int:
        self.note("register", address, nbytes)
        return 0

    def unregister(self, address: int) -> int:
        self.note("unregister", address)
        return 0

    def named(self, *names: str) -> list[tuple[object, ...]]:
        return [call for call in self.calls if call[0] in names]


def geometry(layers: int = 2) -> KvGeometry:
    regions = merged([Region(0, layer * BLOCKS * PAGE, 1, PAGE, PAGE, PAGE) for layer in range(layers)])
    storage = torch.arange(layers * BLOCKS * PAGE, dtype=torch.int64).remainder(251).to(torch.uint8)
    return KvGeometry(BLOCKS, (GroupGeometry(0, "full_attention", 16, ("a", "b"), regions),), (storage,))


def opened(runtime: Recorder, arena: Pages | None = None, **options: int) -> CudaCopier:
    copier = CudaCopier(geometry(), arena or Pages(8), runtime=runtime, **options)
    copier.open()
    return copier


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A recorder that also notes when the copies of a batch are issued."""
    runtime = Recorder()
    for name in ("gather", "scatter", "gather_band", "scatter_band"):
        issue = getattr(StagedCopies, name)

        def noted(self: StagedCopies, *arguments: object, name: str = name, issue: Callable[..., None] = issue) -> None:
            runtime.note(name)
            issue(self, *arguments)

        monkeypatch.setattr(StagedCopies, name, noted)
    return runtime


@pytest.mark.parametrize(
    ("direction", "stream"),
    [("scatter", "stream 0"), ("gather", "stream 1"), ("scatter_band", "stream 0"), ("gather_band", "stream 1")],
)
def test_copies_are_issued_behind_the_fence_on_their_own_stream_and_waited_for_alone(
    spied: Recorder, direction: str, stream: str
) -> None:
    copier = opened(spied)
    fence = copier.fence()
    spied.calls.clear()
    band = (0,) if direction.endswith("band") else ()
    getattr(copier, direction)(0, *band, [4, 1], [0, 3], fence)
    copier.close()
    moved = [call for call in spied.calls if call[0] not in ("register", "unregister", "drain")]
    assert moved == [
        ("on", stream),
        ("upload", [4, 1]),
        ("order_after", stream, "the step"),
        (direction,),
        ("mark", stream),
        ("off", stream),
        ("wait", f"end of {stream}"),
    ]


def test_a_fence_only_marks_the_current_stream() -> None:
    runtime = Recorder()
    copier = opened(runtime)
    runtime.calls.clear()
    assert copier.fence() == "the step"
    assert runtime.calls == [("mark_current",)]


def test_bytes_go_round_in_parts_of_the_staging_memory_and_across_slices() -> None:
    runtime = Recorder()
    arena = Pages(8)
    copier = opened(runtime, arena, staging_bytes=4 * 4096, pin_slice_bytes=3 * 4096)
    kv = copier._geometry.storages[0]
    before = kv.clone()
    copier.gather(0, [5, 0, 3, 1, 2], [1, 2, 3, 4, 7], None)
    kv.zero_()
    copier.scatter(0, [5, 0, 3, 1, 2], [1, 2, 3, 4, 7], None)
    after, original = kv.view(2, BLOCKS, PAGE), before.view(2, BLOCKS, PAGE)
    assert torch.equal(after[:, [5, 0, 3, 1, 2]], original[:, [5, 0, 3, 1, 2]])
    assert not after[:, 4].any()
    copier.close()


def test_the_arena_is_locked_from_the_first_copy_on_and_unlocked_at_close() -> None:
    runtime = Recorder()
    arena = Pages(8)
    copier = opened(runtime, arena, pin_slice_bytes=3 * 4096)
    copier.fence()
    assert runtime.named("register") == [], "an engine may be capturing graphs now"
    copier.gather(0, [0], [0], None)
    assert copier._pinner is not None
    assert copier._pinner.wait(60)
    assert copier.pinned_bytes == arena.array.nbytes
    expected = [(arena.address + start * 4096, count * 4096) for start, count in ((0, 3), (3, 3), (6, 2))]
    assert runtime.named("register") == [("register", *slice_) for slice_ in expected]
    copier.close()
    copier.close()
    assert sorted(runtime.named("unregister")) == [("unregister", address) for address, _ in expected]
    assert copier.pinned_bytes == 0
    order = [call[0] for call in runtime.calls]
    assert max(i for i, name in enumerate(order) if name == "drain") < order.index("unregister")


class Stripe:
    """The second of three ranks' pages, with those of the others between them."""

    def __init__(self, pages: int) -> None:
        self.whole = np.full((pages, 3, 4096), 0xEE, np.uint8)
        self.array = self.whole[:, 1]
        self.address = self.array.ctypes.data


@pytest.mark.parametrize("is_one_run", [False, True])
@pytest.mark.parametrize("refused", [0, 2])
def test_pages_that_lie_apart_are_copied_one_by_one_and_locked_with_what_lies_between(
    monkeypatch: pytest.MonkeyPatch, refused: int, is_one_run: bool
) -> None:
    """A driver that refuses a part is warned of once, and costs speed only."""
    warnings: list[object] = []
    monkeypatch.setattr(pinning._log, "warning", lambda *words: warnings.append(words))
    runtime, stripe = Recorder(), Stripe(8)
    apart = 3 * 4096
    copies: list[bool] = []
    copy = torch.Tensor.copy_

    def noted(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copies.append(self.is_contiguous() and source.is_contiguous())
        return copy(self, source, non_blocking)

    def register(address: int, nbytes: int) -> int:
        runtime.note("register", address, nbytes)
        return refused if address != stripe.address else 0

    runtime.register = register  # type: ignore[method-assign]
    copier = CudaCopier(geometry(layers=1 if is_one_run else 2), stripe, runtime=runtime, pin_slice_bytes=3 * apart)
    copier.open()
    kv = copier._geometry.storages[0]
    before = kv.clone()
    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    copier.gather(0, list(range(BLOCKS)), list(range(1, 1 + BLOCKS)), None)
    assert copier._pinner is not None
    assert copier._pinner.wait(60)
    kv.zero_()
    copier.scatter(0, list(range(BLOCKS)), list(range(1, 1 + BLOCKS)), None)
    assert copies == [True] * (2 * BLOCKS), "torch would copy others through memory of its own"
    assert torch.equal(kv, before)
    assert (stripe.whole[:, [0, 2]] == 0xEE).all()
    slices = [("register", stripe.address + start * apart, 3 * apart) for start in (0, 3)]
    slices.append(("register", stripe.address + 6 * apart, apart + 4096))
    assert runtime.named("register") == (slices[:2] if refused else slices)
    assert len(warnings) == bool(refused)
    copier.close()


@pytest.mark.parametrize("where", ["upload", "order_after", "gather", "mark", "wait"])
def test_after_an_error_nothing_is_under_way_any_more_when_it_is_reported(spied: Recorder, where: str) -> None:
    copier = opened(spied)
    spied.fail[where] = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(TransferError, match="copying 1 blocks of KV group 0 failed on the GPU: an illegal"):
        copier.gather(0, [1], [2], "fence")
    names = [call[0] for call in spied.calls if call[0] != "register"]
    assert names[-1] == "drain"
    spied.fail.clear()
    copier.gather(0, [1], [2], "fence")
    copier.close()


def test_a_device_that_is_broken_still_lets_the_copier_close() -> None:
    runtime = Recorder()
    copier = opened(runtime)
    runtime.fail["drain"] = RuntimeError("device lost")
    copier.close()
    assert len(runtime.named("drain")) == 2


def test_batches_of_several_threads_are_issued_while_others_wait_for_the_device() -> None:
    both_wait = threading.Barrier(2, timeout=60)
    runtime = Recorder(waiting=lambda: both_wait.wait())
    copier = opened(runtime)
    threads = [threading.Thread(target=copier.gather, args=(0, [number], [number], None)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not both_wait.broken, "the second batch was issued only after the first had ended"
    assert len(runtime.named("wait")) == 2
    copier.close()


def test_nothing_is_issued_for_a_wrong_batch_or_outside_of_open_and_close() -> None:
    runtime = Recorder()
    copier = opened(runtime)
    runtime.calls.clear()
    for blocks, pages in (([BLOCKS], [0]), ([0], [8]), ([0, 1], [0]), ([1, 2], [3, 3])):
        with pytest.raises(TransferError, match="nothing was moved"):
            copier.gather(0, blocks, pages, None)
    with pytest.raises(TransferError, match="block 2 is the destination of two"):
        copier.scatter(0, [2, 2], [0, 1], None)
    assert runtime.named("on", "upload", "mark") == []
    copier.close()
    with pytest.raises(StateError, match="not open"):
        copier.gather(0, [0], [0], None)
    with pytest.raises(StateError, match="not open"):
        CudaCopier(geometry(), Pages(8), runtime=runtime).scatter(0, [0], [0], None)


def test_a_gpu_without_room_for_staging_stops_the_start_with_a_sentence() -> None:
    runtime = Recorder(fail={"on": RuntimeError("CUDA out of memory")})
    with pytest.raises(
        ConfigError, match=r"refuses 67108864 bytes of staging memory .* lower --gpu-memory-utilization"
    ):
        CudaCopier(geometry(), Pages(8), runtime=runtime).open()


def test_memory_is_locked_and_unlocked_for_the_device_of_the_rank_by_whatever_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread begins on the first device, which would get a context of half a GiB for it, once for each rank."""
    current, seen = threading.local(), []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.index = wanted.index
        yield
        current.index = 0

    def called(name: str) -> Callable[..., SimpleNamespace]:
        def call(*_: int) -> SimpleNamespace:
            seen.append((name, getattr(current, "index", 0)))
            return SimpleNamespace(value=0)

        return call

    driver = SimpleNamespace(cudaHostRegister=called("lock"), cudaHostUnregister=called("unlock"))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    runtime = TorchCuda(torch.device("cuda:3"))
    assert (runtime.register(4096, 8192), runtime.unregister(4096)) == (0, 0)
    assert seen == [("lock", 3), ("unlock", 3)]
