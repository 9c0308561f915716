"""What vLLM leaves on SSD can be verified by ``umbp pool``, rank by rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.engine_free.test_failures import HYBRID
from tests.vllm.harness.traffic import tokens
from umbp_connectors.pool.inspection import find_catalogues
from umbp_connectors.pool.maintenance import evict, load, verify


@pytest.mark.parametrize(
    "spec", [{}, {"tp": 2}, {"pp": 2}, {"groups": HYBRID}], ids=lambda spec: str(list(spec.values()))
)
def test_every_ranks_part_is_what_was_stored(make_umbp: MakeUmbp, tmp_path: Path, spec: dict[str, Any]) -> None:
    engine = make_umbp({"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}, **spec)
    engine.store(tokens(24))
    (catalogue,) = find_catalogues(tmp_path)
    assert catalogue.in_use
    engine.close()
    (catalogue,) = find_catalogues(tmp_path)
    assert not catalogue.in_use
    ranks = spec.get("tp", 1) * spec.get("pp", 1)
    assert (catalogue.ranks, len(catalogue.prefixes), len(catalogue.layouts)) == (ranks, ranks, ranks)
    verdict = verify(catalogue)
    assert verdict.problems == []
    assert verdict.unverifiable == 0
    assert verdict.objects >= 6
    stored = catalogue.objects()
    parts = {bytes(load(catalogue, stored[0], rank)) for rank in range(ranks)}
    assert len(parts) == ranks, "each rank has another part"
    assert evict(catalogue, [row.key for row in stored]) == len(stored)
    engine = make_umbp({"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}, **spec)
    name = engine.add(tokens(26), max_tokens=1)
    engine.drain()
    assert engine.external_tokens(name) == 0
    engine.close()
