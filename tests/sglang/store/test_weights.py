"""Which weights a page was computed with: what SGLang publishes of them is part of whose page it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.arg_groups.fields.model import Model
from sglang.srt.arg_groups.fields.spec import Spec

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import hashes, mha_pool, rows, storage_config
from umbp_sglang import weights

DRAFT = (
    *("speculative_draft_model_path", "speculative_draft_model_revision", "speculative_algorithm"),
    "speculative_draft_kv_cache_dtype",
)


class Published:
    """What SGLang publishes of the model and its draft in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(100))
        self.folder = folder
        self.model: dict[str, Any] = {"model_path": str(folder), "dtype": "auto"}
        self.draft: dict[str, Any] = {}
        monkeypatch.setattr(runtime_context, "get_model", lambda: SimpleNamespace(**self.model))
        monkeypatch.setattr(runtime_context, "get_spec", lambda: SimpleNamespace(**self.draft))


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Published:
    return Published(monkeypatch, tmp_path / "model")


def new_bytes(published: Published) -> None:
    (published.folder / "model.safetensors").write_bytes(b"trained" + bytes(93))


def draft(published: Published, algorithm: str) -> None:
    published.draft = {"speculative_draft_model_path": str(published.folder), "speculative_algorithm": algorithm}


CHANGES = {
    "new weights under the old path": new_bytes,
    "another type": lambda published: published.model.update(dtype="float16"),
    "another quantisation": lambda published: published.model.update(quantization="fp8"),
    "the other kind of 8-bit floats": lambda published: published.model.update(kv_cache_dtype="fp8_e4m3"),
    "scales of KV": lambda published: published.model.update(quantization_param_path="scales.json"),
    "an overridden configuration": lambda published: published.model.update(json_model_override_args='{"rope": 2}'),
    "made-up weights": lambda published: published.model.update(load_format="dummy"),
    "another name of a hub": lambda published: published.model.update(model_path="somebody/model"),
    "an indexer's type": lambda published: published.model.update(qsa_indexer_dtype="fp8_e4m3"),
    "a draft": lambda published: draft(published, "EAGLE"),
}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_other_weights_find_nothing(stores: Stores, published: Published, tmp_path: Path, change: str | None) -> None:
    config = storage_config(extra={"ssd_dir": str(tmp_path / "ssd"), "ssd_capacity": "64MiB", "ssd_engines": 4})
    keys = hashes(2)
    first = stores(config, mha_pool())
    assert first.batch_set_v1(keys, rows(0, 1)) == [True, True]
    first.close()
    if change:
        CHANGES[change](published)
    assert stores(config, mha_pool()).batch_exists(keys) == (0 if change else 2)


def test_sglangs_host_pools_do_not_tell_8_bit_floats_apart() -> None:
    """Why the settings must: both are bytes there, and a page of one read as the other would be wrong KV."""
    kinds = (torch.float8_e5m2, torch.float8_e4m3fn)
    assert {mha_pool(dtype=kind).dtype for kind in kinds} == {torch.uint8}


def test_a_copy_of_the_folder_has_the_same_weights_but_another_path(published: Published) -> None:
    """Where a model lies is part of its name: a needless difference costs hits, a missing one a wrong token."""
    before = weights.known_weights()
    assert weights.known_weights() == before
    published.model["model_path"] = str(published.folder.rename(published.folder.with_name("moved")))
    assert weights.known_weights() != before


def test_outside_of_a_server_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_context._CONTEXT, "_config_bags", {})
    assert weights.known_weights() == {"model": None, "draft": None}


def test_sglang_publishes_what_is_asked_for() -> None:
    """A name that SGLang changed would be read as nothing, and tell no weights apart any more."""
    model, spec = ({field.name for field in msgspec.structs.fields(kind)} for kind in (Model, Spec))
    assert {"model_path", "revision", "load_format", *weights._DECIDING} <= model
    assert set(DRAFT) <= spec
