"""TEST-ONLY stand-in for SGLang's kernels, which have no wheel for a CPU.

SGLang imports names from here at module level, on paths that a CPU takes too.  Every name is found; calling one is an
error, because a kernel that a test really needs is in ``umbp_cpu_shim``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence

__version__ = "0+umbp.cpu.shim"

# SGLang asks whether this module exists, and takes another one where it does not.
_LEFT_OUT = f"{__name__}.scalar_type"


def _missing_kernel(name: str) -> Callable[..., None]:
    def kernel(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(f"{name} was called on a machine without SGLang's kernels")

    return kernel


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing_kernel(f"{__name__}.{name}")


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing_kernel(f"{self.__name__}.{name}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module below this one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(f"{__name__}.") and fullname != _LEFT_OUT:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.append(_Submodules())
