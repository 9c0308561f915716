"""These tests need torch and a CUDA or ROCm device, and no engine; elsewhere they are not collected."""

from __future__ import annotations

import importlib.util


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


collect_ignore_glob = [] if _has_gpu() else ["test_*.py"]
