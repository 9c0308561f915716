"""The adapter builds on the connector's base class, and on nothing of vLLM's own offloading, which is not stable."""

from __future__ import annotations

import re
from pathlib import Path

import umbp_vllm
from umbp_vllm.connector import UmbpConnector

PACKAGE = Path(umbp_vllm.__file__).parent
INTERNALS = re.compile(r"vllm\.v1\.(simple_)?kv_offload|kv_connector\.v1\.(?!base\b|metrics\b)\w+")
"""Also as the text that ``importlib`` is given."""


def test_no_module_names_vllms_offloading_or_another_connector() -> None:
    found = {path.name: INTERNALS.findall(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 30
    assert {name: matches for name, matches in found.items() if matches} == {}


def test_it_would_be_noticed() -> None:
    for name in (
        "from vllm.v1.kv_offload.base import OffloadKey",
        'importlib.import_module("vllm.v1.simple_kv_offload.manager")',
        "from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector",
    ):
        assert INTERNALS.search(name)
    assert not INTERNALS.search("from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1")


def test_the_facade_inherits_the_two_public_classes_only() -> None:
    theirs = {base.__module__ for base in UmbpConnector.__mro__ if base.__module__.startswith("vllm.")}
    assert theirs == {"vllm.distributed.kv_transfer.kv_connector.v1.base"}
