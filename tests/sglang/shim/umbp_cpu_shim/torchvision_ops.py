"""TEST-ONLY.  Makes ``import torchvision`` work where it is a CUDA build beside a CPU torch.

Its compiled operators do not load then, and it fails where it describes two of them for tracing.  That they have a
schema is enough; SGLang uses the parts that are written in Python.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing; defines the schemas when somebody looks for torchvision."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _define()
        return None


def install() -> None:
    """Be ready for the first import of torchvision.  Idempotent."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _define() -> None:
    from torch import cuda, library

    if cuda.is_available():
        return
    for name in ("nms", "qnms"):
        try:
            library.define(f"torchvision::{name}", _SCHEMA)
        except RuntimeError:
            return  # this torchvision's own operators are there
