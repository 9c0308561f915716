"""Our computation of vLLM's block hashes against the installed vLLM's own request hasher, and what its events say."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from umbp_connectors.prompt_hashes import cbor
from umbp_connectors.prompt_hashes.hasher import CannotHash, Namespace
from umbp_connectors.prompt_hashes.tags import hasher_of
from umbp_connectors.prompt_hashes.vllm import DEFAULT_SEED, DIGESTS
from umbp_vllm import compat

BLOCK = 16
KEYS = "tagged" if compat.has_tagged_hash_keys(compat.vllm_version()) else "untagged"
NAMESPACES = [
    Namespace(),
    Namespace(cache_salt="tenant-7"),
    Namespace(lora_name="poet", lora_path="/adapters/poet"),
    Namespace(lora_name="same", lora_path="same"),
    Namespace(cache_salt="ümlaut", lora_name="poet", lora_path="/adapters/poet"),
]


@pytest.fixture(autouse=True)
def _own_start() -> Iterator[None]:
    """The chain's start is a global of vLLM."""
    before = kv_cache_utils.__dict__.get("NONE_HASH")
    yield
    if before is not None:
        kv_cache_utils.NONE_HASH = before


def engine_hashes(tokens: Sequence[int], name: str, namespace: Namespace) -> list[bytes]:
    """What the engine itself would publish."""
    function = get_hash_fn_by_name(name)
    kv_cache_utils.init_none_hash(function)
    adapter = None
    if namespace.lora_name:
        adapter = LoRARequest(_apart(namespace.lora_name), 1, _apart(namespace.lora_path))
    request = Request(
        request_id="r",
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        lora_request=adapter,
        cache_salt=namespace.cache_salt or None,
        block_hasher=kv_cache_utils.get_request_block_hasher(BLOCK, function),
    )
    return [_published(kv_cache_utils.maybe_convert_block_hash(each)) for each in request.block_hashes]


def _apart(text: str) -> str:
    """A string of its own, as a request from another process has it."""
    return text.encode().decode()


def _published(value: int | bytes) -> bytes:
    return str(value).encode() if isinstance(value, int) else value.hex().encode()


def prompt(length: int, seed: int = 0) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.choice((0, 5, 23, 24, 255, 256, 65535, 65536, 151_000, 2**31)) for _ in range(length)]


@pytest.mark.parametrize("form", ["int64", "hex"])
@pytest.mark.parametrize("namespace", NAMESPACES, ids=str)
@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_our_hashes_are_the_engines(
    name: str, namespace: Namespace, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "42")
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "1" if form == "int64" else "0")
    tags = {"block": str(BLOCK), "hash": name, "hash_form": form, "hash_start": "seed", "hash_keys": KEYS}
    hasher = hasher_of(tags, seed="42")
    for length in (0, 1, BLOCK - 1, BLOCK, 10 * BLOCK + 3):
        tokens = prompt(length, seed=length)
        ours = hasher.hashes(tokens, namespace)
        assert len(ours) == length // BLOCK
        assert ours == engine_hashes(tokens, name, namespace)


@pytest.mark.skipif(not compat.has_fixed_none_hash(compat.vllm_version()), reason="their start is random before 0.29")
@pytest.mark.parametrize("name", ["sha256", "sha256_cbor"])
def test_without_a_seed_cryptographic_chains_start_from_what_everybody_knows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert kv_cache_utils.DEFAULT_NONE_HASH_SEED == DEFAULT_SEED
    tokens = prompt(5 * BLOCK)
    hasher = hasher_of({"block": str(BLOCK), "hash": name, "hash_start": "default"})
    assert hasher.hashes(tokens) == engine_hashes(tokens, name, Namespace())


def test_a_random_start_is_refused_because_nobody_can_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    tokens = prompt(BLOCK)
    assert engine_hashes(tokens, "xxhash", Namespace()) != engine_hashes(tokens, "xxhash", Namespace())
    with pytest.raises(CannotHash, match="PYTHONHASHSEED"):
        hasher_of({"block": str(BLOCK), "hash": "xxhash", "hash_start": "random"})


def test_a_long_block_is_hashed_with_the_frames_of_its_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickle divides what is longer than 64 KiB."""
    monkeypatch.setenv("PYTHONHASHSEED", "42")
    tokens = prompt(40_000)
    function = get_hash_fn_by_name("sha256")
    kv_cache_utils.init_none_hash(function)
    theirs = kv_cache_utils.hash_block_tokens(function, None, tokens, None)
    hasher = hasher_of({"block": "40000", "hash": "sha256", "hash_form": "hex", "hash_start": "seed"}, seed="42")
    assert hasher.hashes(tokens) == [theirs.hex().encode()]


def test_our_cbor_is_the_engines() -> None:
    import cbor2

    numbers = [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1, -1, -24, -25, -(2**32)]
    items: list[cbor.Item] = [None, b"", b"x" * 300, "", "ü" * 200, (), [1, (2, ("a", None))], *numbers, tuple(numbers)]
    for item in items:
        assert cbor.encode(item) == cbor2.dumps(item, canonical=True)
