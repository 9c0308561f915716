"""Every difference between the supported SGLang versions, and the only place that asks for what may not be there."""

from __future__ import annotations

import importlib
from typing import Any


def optional(owner: Any, name: str, default: Any = None) -> Any:
    """``owner.name``, or ``default`` where this SGLang has no such attribute (or no such owner)."""
    return getattr(owner, name, default)


def storage_metrics(**counts: list[Any]) -> Any:
    """SGLang's ``StorageMetrics`` with these lists."""
    return importlib.import_module("sglang.srt.observability.metrics_collector").StorageMetrics(**counts)
