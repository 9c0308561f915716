"""One tiny model for all servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.models import tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers: 128 KiB of KV per page."""
    return tiny_llama(tmp_path_factory.mktemp("model"))
