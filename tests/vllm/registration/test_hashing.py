"""When block hashes mean the same elsewhere and later; checked against vLLM's own computation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from umbp_vllm.hashing import describe_hashing, hash_stability

ALGORITHMS = ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"]


def config(algorithm: str) -> SimpleNamespace:
    return SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("version", ["0.28.0", "0.29.0", "0.32.0"])
@pytest.mark.statement("connector", 79)
def test_a_fixed_seed_is_stable_everywhere(algorithm: str, version: str) -> None:
    stability = hash_stability(config(algorithm), {"PYTHONHASHSEED": "42"}, version)
    assert stability.stable
    assert stability.advice == ""


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize("env", [{}, {"PYTHONHASHSEED": "random"}, {"PYTHONHASHSEED": ""}])
@pytest.mark.statement("connector", 79)
def test_sha256_is_stable_by_itself_from_0_29_on(algorithm: str, env: dict[str, str]) -> None:
    assert hash_stability(config(algorithm), env, "0.29.0").stable


@pytest.mark.parametrize("env", [{}, {"PYTHONHASHSEED": "random"}, {"PYTHONHASHSEED": ""}])
@pytest.mark.parametrize(
    ("algorithm", "version"), [("sha256", "0.28.0"), ("xxhash", "0.32.0"), ("xxhash_cbor", "0.28.1")]
)
def test_the_rest_is_not_and_the_advice_says_what_to_set(algorithm: str, version: str, env: dict[str, str]) -> None:
    stability = hash_stability(config(algorithm), env, version)
    assert not stability.stable
    assert algorithm in stability.advice
    assert "PYTHONHASHSEED=0" in stability.advice
    assert "SSD tier are off" in stability.advice
    assert "\n" not in stability.advice
    assert ("sha256_cbor" in stability.advice) == algorithm.startswith("xxhash")


def test_the_advice_can_be_followed() -> None:
    assert hash_stability(config("sha256_cbor"), {}, "0.32.0").stable
    assert hash_stability(config("xxhash"), {"PYTHONHASHSEED": "0"}, "0.32.0").stable


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", [None, "42"])
def test_the_installed_vllm_starts_its_chains_as_we_say(
    algorithm: str, seed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

    env = {} if seed is None else {"PYTHONHASHSEED": seed}
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    function = get_hash_fn_by_name(algorithm)
    same = resolve_none_hash_seed(function) == resolve_none_hash_seed(function)
    assert hash_stability(config(algorithm), env).stable is same


def test_the_description_tells_every_difference_and_no_seed() -> None:
    cases = [
        describe_hashing(config(algorithm), env, version)
        for algorithm in ALGORITHMS
        for env in ({}, {"PYTHONHASHSEED": "1234567"}, {"PYTHONHASHSEED": "2"})
        for version in ("0.30.0", "0.31.0")
    ]
    texts = [str(case) for case in cases]
    assert len(set(texts)) == len(texts)
    assert not any("1234567" in text for text in texts)
    assert describe_hashing(config("sha256"), {}, "0.31.0") == describe_hashing(config("sha256"), {}, "0.32.0")
