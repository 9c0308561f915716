"""While blocks are gathered and scattered on a CPU, the engine's own threads run: the batch lets go of the GIL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.connectors.gil import Bystander
from tests.vllm.copiers.test_copies import Pages, opened
from umbp_vllm.geometry import GroupGeometry, KvGeometry, Region

BLOCKS = 64
LAYER_BYTES = 256 << 10


@pytest.fixture
def bystander() -> Iterator[Bystander]:
    with Bystander().watching() as bystander:
        yield bystander


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_while_a_batch_of_blocks_is_copied(bystander: Bystander, direction: str) -> None:
    stride = 2 * LAYER_BYTES
    regions = [Region(0, at, 1, LAYER_BYTES, stride, LAYER_BYTES) for at in (0, LAYER_BYTES)]
    storage = torch.ones(BLOCKS * stride, dtype=torch.uint8)
    geometry = KvGeometry(BLOCKS, (GroupGeometry(0, "full", 16, (), tuple(regions)),), (storage,))
    arena = Pages(BLOCKS, geometry.page_bytes)
    copier = opened(geometry, arena)
    copy = copier.gather if direction == "gather" else copier.scatter
    numbers = list(range(BLOCKS))
    assert bystander.runs_during(lambda: copy(0, numbers, numbers, None))
    assert arena.array.all() if direction == "gather" else not storage.any(), "the bytes have moved"
