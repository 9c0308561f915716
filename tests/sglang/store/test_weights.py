"""Which weights a page was computed with: what SGLang publishes of them is part of whose page it is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import msgspec
import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.arg_groups.fields.lora import Lora
from sglang.srt.arg_groups.fields.model import Model
from sglang.srt.arg_groups.fields.spec import Spec
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.server_args import ServerArgs

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import hashes, mha_pool, rows, storage_config
from umbp_sglang import weights

DRAFT = (
    *("speculative_draft_model_path", "speculative_draft_model_revision", "speculative_algorithm"),
    "speculative_draft_kv_cache_dtype",
)


class Published:
    """What SGLang publishes of the model, its draft and its adapters in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(100))
        self.folder = folder
        self.model: dict[str, Any] = {"model_path": str(folder), "dtype": "auto"}
        self.draft: dict[str, Any] = {}
        self.adapters: list[LoRARef] = []
        self._patch = monkeypatch
        monkeypatch.setattr(runtime_context, "get_model", lambda: SimpleNamespace(**self.model))
        monkeypatch.setattr(runtime_context, "get_spec", lambda: SimpleNamespace(**self.draft))
        monkeypatch.setattr(
            runtime_context,
            "get_lora",
            lambda: SimpleNamespace(enable_lora=bool(self.adapters), lora_paths=self.adapters),
        )

    def publish(self, path: str, value: object) -> None:
        """Let the setting ``part.name`` or ``part.group.name`` be ``value``."""
        part, *groups, name = path.split(".")
        if part == "model":
            self.model[name] = value
            return
        if part == "spec":
            self.draft[name] = value
            return
        bag = SimpleNamespace(**{name: value})
        for group in reversed(groups):
            bag = SimpleNamespace(**{group: bag})
        self._patch.setattr(runtime_context, f"get_{part}", lambda: bag)

    def adapter(self, name: str = "support") -> Path:
        """Start with an adapter of this name; its folder."""
        folder = self.folder.parent / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16}))
        (folder / "adapter_model.safetensors").write_bytes(b"first" + bytes(95))
        self.adapters.append(
            LoRARef(lora_id=LoRARef.deterministic_id(name, str(folder)), lora_name=name, lora_path=str(folder))
        )
        return folder


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
    "another loader": lambda published: published.publish("model.load_format", "bitsandbytes"),
    "what the loader is told": lambda published: published.publish("model.model_loader_extra_config", '{"q": 4}'),
    "a quantisation by ModelOpt": lambda published: published.publish("model.modelopt_quant", {"format": "fp8"}),
    "weights that have a version": lambda published: published.publish("serving.weight_version", "step-7"),
    "states of another type": lambda published: published.publish("exec.mamba.mamba_ssm_dtype", "float16"),
    "another preparation of images": lambda published: published.publish("mm.mm_process_config", {"image": {"x": 1}}),
    "a draft's quantisation": lambda published: published.publish("spec.speculative_draft_model_quantization", "fp8"),
    "a made-up draft": lambda published: published.publish("spec.speculative_draft_load_format", "dummy"),
    "an adapter": lambda published: published.adapter(),
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


def retrained(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"again" + bytes(95))


def applied_otherwise(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 32}))


def with_tokens(folder: Path) -> None:
    (folder / "added_tokens.json").write_text("{}")


@pytest.mark.parametrize("change", [None, retrained, applied_otherwise, with_tokens])
def test_an_adapter_with_other_files_under_its_old_path_finds_nothing(
    stores: Stores, published: Published, tmp_path: Path, change: Any
) -> None:
    """SGLang names it by its name and path, in every life of a server: the hashes of its pages are the same."""
    config = storage_config(extra={"ssd_dir": str(tmp_path / "ssd"), "ssd_capacity": "64MiB", "ssd_engines": 4})
    published.adapter("first"), published.adapter("second")
    named = RadixKey(list(range(8)), extra_key=LoRARef.deterministic_id("first", str(tmp_path / "first")))
    keys = get_storage_hash_str(named, None, page_size=4)
    before = stores(config, mha_pool())
    assert before.batch_set_v1(keys, rows(0, 1)) == [True, True]
    before.close()
    if change:
        change(tmp_path / "first")
    published.adapters.reverse()
    after = stores(config, mha_pool())
    assert after.batch_exists(keys) == (0 if change else 2)
    assert after.batch_get_v1(keys, rows(2, 3)) == [change is None] * 2


def test_an_adapter_that_a_hub_has_is_told_by_its_commit(
    monkeypatch: pytest.MonkeyPatch, published: Published, tmp_path: Path
) -> None:
    published.adapters = [LoRARef(lora_id="x", lora_name="x", lora_path="somebody/adapter")]
    found = [weights.known_weights()]
    for commit in ("a" * 40, "b" * 40):
        folder = tmp_path / "models--somebody--adapter" / "snapshots" / commit
        cached = str(folder / "adapter_config.json")
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, cached=cached, **__: cached)
        found.append(weights.known_weights())
    assert len({json.dumps(each, sort_keys=True) for each in found}) == 3


@pytest.mark.parametrize("name", [*weights._FILES, "spec.uno_lora_path"])
def test_a_named_file_counts_by_its_content(published: Published, tmp_path: Path, name: str) -> None:
    """Scales of KV, a restored checkpoint, a configuration that was decrypted: replaced under the old name."""
    file = tmp_path / "named.json"
    found = [weights.known_weights()]
    published.publish(name, str(file))
    for content in ("one", "two"):
        file.write_text(content)
        found.append(weights.known_weights())
    assert len({json.dumps(each, sort_keys=True) for each in found}) == 3


def test_what_is_not_used_changes_nothing(published: Published) -> None:
    """Pages of an earlier version of ours are found as long as nothing of the rest is set."""
    published.publish("serving.weight_version", "default")
    published.publish("model.model_loader_extra_config", "{}")
    published.publish("model.quantization", "fp8")
    published.publish("spec.speculative_draft_model_quantization", "fp8")
    assert set(weights.known_weights()) == {"model", "draft"}


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
    model, spec, lora = ({field.name for field in msgspec.structs.fields(kind)} for kind in (Model, Spec, Lora))
    assert {"model_path", "revision", "load_format", *weights._DECIDING} <= model
    assert {*DRAFT, "uno_lora_path"} <= spec
    assert {"enable_lora", "lora_paths"} <= lora
    assert {"lora_id", "lora_path"} <= {field.name for field in msgspec.structs.fields(LoRARef)}
    published = {f"{path}.{name}" for name, path in namespace_of(ServerArgs).items()}
    assert {*weights._RARE, *weights._FILES} <= published


def defaults(names: Iterable[str]) -> dict[str, object]:
    arguments = ServerArgs(model_path="any")
    return {name: getattr(arguments, name.rpartition(".")[2]) for name in names}


def test_defaults_of_sglang_are_known() -> None:
    """Otherwise every store would be told apart from those of earlier versions."""
    assert [name for name, value in defaults(weights._RARE).items() if value not in weights._DEFAULTS] == []
    assert [name for name, value in defaults(weights._FILES).items() if value] == []
