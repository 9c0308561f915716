"""Engines that differ in what their pages are never see each other's, though they use one folder."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.sglang.kit.conftest import World
from tests.sglang.kit.rig import UMBP, Setup
from tests.sglang.kit.shapes import FULL, SWA, prompt_of

TOGETHER = {"ssd_engines": 3}
"""Engines that follow one another over one folder and are not the same need room beside each other there."""
PLAIN = Setup(UMBP, FULL, extra=TOGETHER)
OTHERS = {
    "the same": PLAIN,
    "model": dataclasses.replace(PLAIN, model="another"),
    "a model of the same short name": dataclasses.replace(PLAIN, model="somebody/tiny"),
    "page_first_direct": dataclasses.replace(PLAIN, layout="page_first_direct"),
    "page_head": dataclasses.replace(PLAIN, layout="page_head"),
    "layer_first": dataclasses.replace(PLAIN, layout="layer_first"),
    "type of the same size": dataclasses.replace(PLAIN, cfg=dataclasses.replace(FULL, dtype=torch.float16)),
    "heads for head size": dataclasses.replace(PLAIN, cfg=dataclasses.replace(FULL, head_num=4, head_dim=8)),
    "layers": dataclasses.replace(PLAIN, cfg=dataclasses.replace(FULL, num_layers=8)),
    "rank": dataclasses.replace(PLAIN, tp=(1, 2)),
    "number of ranks": dataclasses.replace(PLAIN, tp=(0, 2)),
    "namespace": dataclasses.replace(PLAIN, extra={**TOGETHER, "namespace": "another"}),
    "kind of model": dataclasses.replace(PLAIN, cfg=dataclasses.replace(SWA, num_layers=6)),
}


APART = {"the same", "model", "a model of the same short name", "rank", "namespace"}
"""These have folders of their own on the SSD; of the others, the one that comes later takes the place."""


@pytest.mark.parametrize("what", OTHERS)
def test_only_the_same_engine_finds_the_pages(world: World, what: str) -> None:
    """The layouts' pages are equally large and the hashes are equal, so the identity alone keeps them apart."""
    prompt = prompt_of(FULL, 8)
    first = world.engine(PLAIN)
    first.compute(prompt)
    first.offload(prompt)
    first.stop()
    second = world.engine(OTHERS[what])
    assert second.prefetch(prompt) == (len(prompt) if what == "the same" else 0)
    second.compute(prompt)
    second.offload(prompt)
    second.stop()
    third = world.engine(PLAIN)
    came = third.prefetch(prompt)
    assert came == len(prompt) if what in APART else came in (0, len(prompt))
    third.compute(prompt)
    third.offload(prompt)
    assert third.check_host(prompt) == len(prompt) * 8
