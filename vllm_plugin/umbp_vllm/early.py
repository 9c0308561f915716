"""Patching ``EngineArgs`` right after it is defined, for ``LLM(kv_connector="umbp")``.

vLLM loads general plugins inside ``EngineArgs.__post_init__``, when the unknown keyword argument has already
been refused.  Platform plugins are asked while ``vllm.config`` is imported, which happens in one of two places:
before anything has imported ``vllm.engine.arg_utils`` (``from vllm import LLM``), or from its very first lines
(``from vllm import EngineArgs``).  Each needs its own way to learn when the classes are there.
"""

from __future__ import annotations

import functools
import importlib.abc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from umbp_vllm import engine_args
from umbp_vllm.registration import hooks_wanted

TARGET = "vllm.engine.arg_utils"
_LAST_CLASS = "AsyncEngineArgs"
_logger = logging.getLogger(__name__)


def install() -> None:
    """Patch the argument classes now or as soon as they exist.  Idempotent."""
    if not hooks_wanted(os.environ):
        return
    module = sys.modules.get(TARGET)
    if module is None:
        if not any(isinstance(finder, _OneShotFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _OneShotFinder())
    elif _LAST_CLASS in vars(module):
        _patch(module)
    else:
        _watch_decorator(module)


def _patch(module: Any) -> None:
    try:
        engine_args.install(module)
    except Exception:  # engine boundary: runs while vLLM imports its own modules
        _logger.debug("umbp: this vLLM takes no kv_connector=...; use kv_transfer_config", exc_info=True)


class _OneShotFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the module, and patches it when it has run; then it is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        for finder in list(sys.meta_path):
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                _patch_after_execution(spec)
                return spec
        return None


def _patch_after_execution(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    execute: Callable[[ModuleType], None] = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        execute(module)
        _patch(module)

    loader.exec_module = exec_module


def _watch_decorator(module: ModuleType) -> None:
    """Patch when the module, which is being executed, has decorated its last argument class.

    Its lines up to here have bound the name ``dataclass``; the class statements are still to come.
    """
    names = vars(module)
    original = names.get("dataclass")
    if original is None:
        _logger.debug("umbp: %s is half imported and not as expected; use kv_transfer_config", TARGET)
        return

    def dataclass(cls: Any = None, /, **options: Any) -> Any:
        if cls is None:
            return functools.partial(dataclass, **options)
        made = original(cls, **options)
        if cls.__name__ == _LAST_CLASS:
            names["dataclass"] = original
            names[_LAST_CLASS] = made
            _patch(module)
        return made

    names["dataclass"] = dataclass
