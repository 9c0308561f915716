"""TEST-ONLY plug-in of SGLang: HiCache on a machine without a GPU.

On such a machine SGLang's "device" pool is ordinary memory, and four things are missing that HiCache needs: the kernels
that copy between the device and the host pool, page-locking (of the host pool and of adapters), a schema that
torchvision's CUDA build wants to see, and, where there is no compiler, the page hash.  They are filled in here; what is
tested (tree, controller, factory, host pools, events, HTTP) stays SGLang's own, and nothing of it is changed on disk.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

_WITH_COPIES = ("mha", "mla", "mamba", "dsa", "unified")


def register() -> None:
    """Entry point of ``sglang.srt.plugins``.  Does nothing where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return
    from sglang.srt.mem_cache.cpp_utils import native_hash
    from sglang.srt.mem_cache.pool_host import common
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from umbp_cpu_shim import copies, page_hash

    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate
    HookRegistry.register("sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__", _without_lock, HookType.AROUND)
    HookRegistry.register("sglang.srt.lora.lora_manager.LoRAManager.__init__", _pageable_adapters, HookType.BEFORE)
    for name in _WITH_COPIES:
        module = importlib.import_module(f"sglang.srt.mem_cache.pool_host.{name}")
        for kernel, function in copies.KERNELS.items():
            vars(module).setdefault(kernel, function)
    native_hash._load_native_hash_module = page_hash.compiled_or_python(native_hash._load_native_hash_module)


def _allocate(
    dims: object, dtype: object, device: str, pin_memory: bool, allocator: Any, registration_granularity_bytes: int = 0
) -> Any:
    return allocator.allocate(dims, dtype=dtype, device=device)


def _without_lock(original: Callable[..., None], pool: object, *args: object, **kwargs: object) -> None:
    original(pool, *args, **{**kwargs, "pin_memory": False})


def _pageable_adapters(*_args: object, **_kwargs: object) -> None:
    """Before adapters are loaded: what they want to be page-locked is ordinary memory."""
    import torch

    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    for name in ("tensor", "zeros"):
        setattr(torch, name, _pageable(vars(torch)[name]))


def _pageable(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made
