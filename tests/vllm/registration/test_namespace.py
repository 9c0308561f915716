"""What tells one engine's objects from another's, and what must not."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from umbp_core.ids import RankScope
from umbp_vllm.namespace import namespace_of, rank_scope

VERSION = "0.32.0"


class Kind(enum.Enum):
    A = 1
    B = 2


@dataclasses.dataclass
class OnlineQuantization:
    bits: int = 4


def an_override(_config: object) -> object:
    return _config


def engine(model: str = "org/model") -> SimpleNamespace:
    """A configuration with the fields that vLLM 0.32 has."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=model,
            model_weights="",
            revision=None,
            dtype="torch.bfloat16",
            quantization=None,
            quantization_config=None,
            hf_overrides={},
            model_impl="auto",
            model_class_overrides={},
            runner_type="generate",
            convert_type="none",
            disable_sliding_window=False,
            multimodal_config=None,
            max_model_len=4096,
            served_model_name="anything",
        ),
        load_config=SimpleNamespace(load_format="auto"),
        cache_config=SimpleNamespace(
            block_size=16,
            cache_dtype="auto",
            kv_cache_dtype_skip_layers=[],
            prefix_match_unit=None,
            prefix_caching_hash_algo="sha256",
            mamba_cache_dtype="auto",
            mamba_ssm_cache_dtype="auto",
            mamba_cache_mode="none",
            num_gpu_blocks=100,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            cp_kv_cache_interleave_size=1,
            data_parallel_rank=0,
            rank=0,
        ),
        speculative_config=None,
        kv_transfer_config=SimpleNamespace(engine_id="random"),
    )


def groups(*sizes: int) -> SimpleNamespace:
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size)) for size in sizes],
        num_blocks=7,
    )


def name_of(config: SimpleNamespace, **options: Any) -> str:
    values = {"kv_cache_config": None, "extra": "", "env": {}, "version": VERSION, **options}
    return namespace_of(config, **values)[0]


def setting(path: str, value: object) -> Callable[[SimpleNamespace], None]:
    def change(config: SimpleNamespace) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            config = getattr(config, owner)
        assert hasattr(config, name)
        setattr(config, name, value)

    return change


DRAFT = SimpleNamespace(method="eagle", model="org/draft", revision=None, quantization=None)
COUNTS = {
    "model": setting("model_config.model", "org/other"),
    "weights elsewhere": setting("model_config.model_weights", "s3://bucket/x"),
    "revision": setting("model_config.revision", "v2"),
    "dtype": setting("model_config.dtype", "torch.float16"),
    "quantization": setting("model_config.quantization", "fp8"),
    "online quantization": setting("model_config.quantization_config", OnlineQuantization()),
    "its bits": setting("model_config.quantization_config", OnlineQuantization(8)),
    "overrides": setting("model_config.hf_overrides", {"rope_theta": 1e6}),
    "override function": setting("model_config.hf_overrides", an_override),
    "implementation": setting("model_config.model_impl", Kind.A),
    "another implementation": setting("model_config.model_impl", Kind.B),
    "class overrides": setting("model_config.model_class_overrides", {"A": "b:C"}),
    "runner": setting("model_config.runner_type", "pooling"),
    "convert": setting("model_config.convert_type", "embed"),
    "window off": setting("model_config.disable_sliding_window", True),
    "multimodal processor": setting(
        "model_config.multimodal_config", SimpleNamespace(mm_processor_kwargs={"fps": 2}, video_pruning_rate=None)
    ),
    "video pruning": setting(
        "model_config.multimodal_config", SimpleNamespace(mm_processor_kwargs=None, video_pruning_rate=0.5)
    ),
    "dummy weights": setting("load_config.load_format", "dummy"),
    "kv dtype": setting("cache_config.cache_dtype", "fp8_e5m2"),
    "another kv dtype": setting("cache_config.cache_dtype", "int8_per_token_head"),
    "layers without it": setting("cache_config.kv_cache_dtype_skip_layers", ["0", "1"]),
    "block size": setting("cache_config.block_size", 32),
    "match unit": setting("cache_config.prefix_match_unit", 8),
    "mamba dtype": setting("cache_config.mamba_cache_dtype", "float32"),
    "mamba mode": setting("cache_config.mamba_cache_mode", "align"),
    "hash": setting("cache_config.prefix_caching_hash_algo", "sha256_cbor"),
    "tp": setting("parallel_config.tensor_parallel_size", 2),
    "pp": setting("parallel_config.pipeline_parallel_size", 2),
    "dcp": setting("parallel_config.decode_context_parallel_size", 2),
    "pcp": setting("parallel_config.prefill_context_parallel_size", 2),
    "cp interleave": setting("parallel_config.cp_kv_cache_interleave_size", 16),
    "draft model": setting("speculative_config", DRAFT),
    "another draft model": setting("speculative_config", SimpleNamespace(**{**vars(DRAFT), "model": "org/draft2"})),
    "draft method": setting("speculative_config", SimpleNamespace(**{**vars(DRAFT), "method": "mtp"})),
    "draft revision": setting("speculative_config", SimpleNamespace(**{**vars(DRAFT), "revision": "v2"})),
}
DOES_NOT_COUNT = {
    "engine id": setting("kv_transfer_config.engine_id", "another"),
    "served name": setting("model_config.served_model_name", "another"),
    "length": setting("model_config.max_model_len", 8192),
    "blocks": setting("cache_config.num_gpu_blocks", 200),
    "data-parallel rank": setting("parallel_config.data_parallel_rank", 1),
    "rank": setting("parallel_config.rank", 1),
    "file format": setting("load_config.load_format", "safetensors"),
    # Workers may find these out while they load the model; the scheduler does not. The layout digest tells them.
    "resolved kv dtype": setting("cache_config.cache_dtype", "fp8"),
    "resolved packed kv dtype": setting("cache_config.cache_dtype", "fp8_ds_mla"),
}


def changed(change: Callable[[SimpleNamespace], None]) -> SimpleNamespace:
    config = engine()
    change(config)
    return config


@pytest.mark.parametrize("change", COUNTS.values(), ids=COUNTS.keys())
def test_what_counts(change: Callable[[SimpleNamespace], None]) -> None:
    assert name_of(changed(change)) != name_of(engine())


def test_all_that_counts_differs_from_each_other() -> None:
    names = [name_of(changed(change)) for change in COUNTS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("change", DOES_NOT_COUNT.values(), ids=DOES_NOT_COUNT.keys())
def test_what_does_not_count(change: Callable[[SimpleNamespace], None]) -> None:
    assert name_of(changed(change)) == name_of(engine())


def test_the_users_part_the_seed_and_the_hash_generation_count() -> None:
    names = {
        name_of(engine()),
        name_of(engine(), extra="team-a"),
        name_of(engine(), env={"PYTHONHASHSEED": "1"}),
        name_of(engine(), env={"PYTHONHASHSEED": "2"}),
        name_of(engine(), version="0.30.0"),
    }
    assert len(names) == 5
    assert name_of(engine(), version="0.31.0") == name_of(engine(), version="0.32.0")
    assert name_of(engine(), env={"HOME": "/elsewhere"}) == name_of(engine())


def test_block_sizes_are_those_of_the_groups() -> None:
    # The scheduler's process changes cache_config.block_size, the workers' do not.
    worker = changed(setting("cache_config.block_size", 128))
    assert name_of(worker, kv_cache_config=groups(16)) == name_of(engine(), kv_cache_config=groups(16))
    assert name_of(engine(), kv_cache_config=groups(16)) != name_of(engine(), kv_cache_config=groups(16, 32))
    assert name_of(engine(), kv_cache_config=groups(16, 32)) != name_of(engine(), kv_cache_config=groups(32, 16))
    assert name_of(engine(), kv_cache_config=groups(16)) == name_of(engine())


def test_the_description_is_plain_json_and_the_name_is_safe_for_a_folder() -> None:
    name, description = namespace_of(engine("/models/My Model (v2)/"), None, "", {}, VERSION)
    assert json.loads(json.dumps(description)) == description
    assert name.startswith("My-Model-v2-")
    assert len(name) <= 96
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@pytest.mark.parametrize("model", ["..", ".", "/", "../.."])
def test_no_model_name_makes_a_folder_that_leads_elsewhere(model: str) -> None:
    assert "/" not in name_of(engine(model))
    assert name_of(engine(model)) not in {".", ".."}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text("{}")
    (root / "model-1.safetensors").write_bytes(bytes(10_000_000))
    (root / "model-2.safetensors").write_bytes(b"small")
    (root / "README.md").write_text("hello")
    return root


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


MODEL_CHANGES: dict[str, Callable[[Path], object]] = {
    "config": lambda root: (root / "config.json").write_text('{"rope_theta": 1}'),
    "new weights": lambda root: (root / "model-1.safetensors").write_bytes(os.urandom(10_000_000)),
    "first byte": lambda root: patch(root / "model-1.safetensors", 0, b"x"),
    "last byte": lambda root: patch(root / "model-1.safetensors", 9_999_999, b"x"),
    "small file": lambda root: patch(root / "model-2.safetensors", 2, b"x"),
    "size": lambda root: patch(root / "model-1.safetensors", 10_000_000, b"x"),
    "name": lambda root: (root / "model-2.safetensors").rename(root / "model-3.safetensors"),
    "one more": lambda root: (root / "model-3.bin").write_bytes(b""),
    "quantization file": lambda root: (root / "hf_quant_config.json").write_text("{}"),
}


@pytest.mark.parametrize("change", MODEL_CHANGES.values(), ids=MODEL_CHANGES.keys())
def test_a_model_that_was_changed_in_place_is_another_one(change: Callable[[Path], object], local: Path) -> None:
    before = name_of(engine(str(local)))
    change(local)
    assert name_of(engine(str(local))) != before


def test_times_and_other_files_do_not_count(local: Path) -> None:
    before = name_of(engine(str(local)))
    (local / "README.md").write_text("changed")
    (local / "tokenizer.json").write_text("{}")
    os.utime(local / "model-1.safetensors", (1, 1))
    assert name_of(engine(str(local))) == before


def test_the_same_files_elsewhere_have_another_name_only(local: Path, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    shutil.copytree(local, there)
    _, here_told = namespace_of(engine(str(local)), None, "", {}, VERSION)
    _, there_told = namespace_of(engine(str(there)), None, "", {}, VERSION)
    assert here_told["model"].pop("name") != there_told["model"].pop("name")
    assert here_told == there_told


def test_a_single_weight_file_is_a_model_too(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    before = name_of(engine(str(path)))
    path.write_bytes(b"two")
    assert name_of(engine(str(path))) != before


def test_a_local_draft_model_counts_by_its_files(local: Path) -> None:
    config = changed(setting("speculative_config", SimpleNamespace(**{**vars(DRAFT), "model": str(local)})))
    before = name_of(config)
    patch(local / "model-1.safetensors", 0, b"x")
    assert name_of(config) != before


COMMITS = ["0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached repository ``org/model``, whose branch ``main`` is at the first commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--org--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMITS[0])
    for commit in COMMITS:
        (root / "snapshots" / commit).mkdir(parents=True)
        (root / "snapshots" / commit / "config.json").write_text("{}")
    return root


def test_a_branch_counts_by_its_commit(hub: Path) -> None:
    config = engine("org/model")
    before, description = namespace_of(config, None, "", {}, VERSION)
    assert description["model"]["commit"] == COMMITS[0]
    config.model_config.revision = "main"
    assert name_of(config) == before
    (hub / "refs" / "main").write_text(COMMITS[1])
    after = name_of(config)
    assert after != before
    config.model_config.revision = COMMITS[1]
    assert name_of(config) == after


def test_offline_and_online_are_the_same_model(hub: Path) -> None:
    path = engine(str(hub / "snapshots" / COMMITS[0]))
    _, online = namespace_of(engine("org/model"), None, "", {}, VERSION)
    _, offline = namespace_of(path, None, "", {}, VERSION)
    assert online == offline
    assert name_of(path) == name_of(engine("org/model"))


def test_a_repository_that_is_not_cached_counts_by_its_revision(hub: Path) -> None:
    _, description = namespace_of(engine("org/unknown"), None, "", {}, VERSION)
    assert description["model"]["commit"] == ""
    config = engine("org/unknown")
    config.model_config.revision = "v2"
    assert name_of(config) != name_of(engine("org/unknown"))


@pytest.fixture(scope="module")
def processes(drive: Any, model_dir: Path) -> list[dict[str, Any]]:
    """Two processes with different hash randomization; the second also gets the first one's configuration."""
    first = drive("namespace_of_engine", {"model": str(model_dir), "pickled": None})
    return [first, drive("namespace_of_engine", {"model": str(model_dir), "pickled": first["pickled"]})]


@pytest.mark.statement("connector", 79)
def test_every_process_of_an_engine_and_a_restart_agree(processes: list[dict[str, Any]]) -> None:
    first, second = processes
    assert first["engine_id"] != second["engine_id"]
    assert second["of_pickled"] == first["name"] == second["name"]
    assert first["description"] == second["description"]


def test_the_installed_vllm_has_every_attribute_that_is_asked_for(processes: list[dict[str, Any]]) -> None:
    # A name that vLLM drops or renames silently leaves the namespace: look up what replaced it.
    assert processes[0]["missing"] == []


def test_the_installed_vllm_has_what_only_some_engines_are_asked_for() -> None:
    from vllm.config import MultiModalConfig, SpeculativeConfig

    def fields(config: Any) -> set[str]:
        return {field.name for field in dataclasses.fields(config)}

    assert fields(MultiModalConfig) >= {"mm_processor_kwargs", "video_pruning_rate"}
    assert fields(SpeculativeConfig) >= {"method", "model", "revision", "quantization"}


def test_the_installed_vllm_is_stable_by_default(processes: list[dict[str, Any]]) -> None:
    assert processes[0]["stable"]
    assert processes[0]["rank"] == RankScope().describe()


def parallel(tp: int, pp: int = 1, dcp: int = 1, pcp: int = 1) -> SimpleNamespace:
    config = copy.deepcopy(engine())
    config.parallel_config = SimpleNamespace(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        decode_context_parallel_size=dcp,
        prefill_context_parallel_size=pcp,
    )
    return config


def test_every_rank_has_its_own_scope() -> None:
    config = parallel(tp=4, pp=2, dcp=2, pcp=2)
    scopes = [
        rank_scope(config, tp_rank, pp_rank, replicated=False, pcp_rank=pcp_rank)
        for tp_rank in range(4)
        for pp_rank in range(2)
        for pcp_rank in range(2)
    ]
    assert len(set(scopes)) == len(scopes)
    assert all(scope.cp_rank < scope.cp_size == 4 for scope in scopes)


def test_replicas_share_a_scope_but_not_across_what_divides_tokens() -> None:
    config = parallel(tp=4, dcp=2)
    scopes = [str(rank_scope(config, tp_rank, 0, replicated=True).describe()) for tp_rank in range(4)]
    assert scopes[0] == scopes[2] != scopes[1] == scopes[3]
