"""Models, the oracle and what else the engine tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before vLLM is imported: the engine lives in the test's process and takes one GiB for its KV.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest

from tests.vllm import models
from tests.vllm.engine.oracle import Oracle


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model of ``tests.vllm.models`` once per session and returns its folder."""
    folder = tmp_path_factory.mktemp("models")

    def make(maker: Callable[..., Path], **settings: int) -> Path:
        target = folder / "-".join([maker.__name__, *(f"{name}{value}" for name, value in settings.items())])
        return target if target.exists() else maker(target, **settings)

    return make


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., Path]) -> Path:
    """The folder of the tiny Llama."""
    return make_model(models.tiny_llama)


@pytest.fixture(scope="session")
def oracle() -> Iterator[Oracle]:
    """The same models without the pool."""
    opened = Oracle()
    yield opened
    opened.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A warning of our own packages fails a test; those that an engine raises about itself must not change it."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"), append=False)
            item.add_marker(pytest.mark.filterwarnings("error:::umbp_(core|connectors|vllm)"))
            item.add_marker(pytest.mark.engine)
