"""An SGLang server as a subprocess and a client for it that measures: what the SGLang demo and its tests share.

Standard library only; the Python that runs SGLang may be another one than the Python that imports this.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from examples.server_process import MODEL_NAME, Answer, EngineServer, ServerFailed

__all__ = [
    "ServerFailed",
    "SglangAnswer",
    "SglangServer",
    "cpu_arguments",
    "cpu_environment",
    "cpu_only",
    "extra_config",
    "restart_without_gpu",
]

PAGE_TOKENS = 64
"""What every server here is started with as ``--page-size``."""

PAGES = "umbp_sglang_pages"
"""The pool's own count of pages, by ``direction`` (``get``, ``put``) and ``result``."""

_BACKEND = "/hicache/storage-backend"
_SHIM = Path(__file__).resolve().parents[1] / "tests" / "sglang" / "shim"


@dataclass(frozen=True, slots=True)
class SglangAnswer(Answer):
    """A completion, and where its reused tokens were: SGLang's ``cached_tokens_details`` (L1, L2 and L3)."""

    device: int
    host: int
    storage: int


@final
@dataclass
class SglangServer(EngineServer):
    """An SGLang server with HiCache, metrics and cache reports (see :class:`EngineServer`).

    ``launcher`` is what Python runs, up to the model: a module, or the script ``sglang`` with ``serve``.  ``admin_key``
    is what SGLang wants to know before it attaches, detaches or flushes; without one it does not attach.
    """

    launcher: Sequence[str] = ("-m", "sglang.launch_server")
    admin_key: str = ""

    def command(self) -> list[str]:
        """The command line up to the caller's own arguments."""
        serve = [self.python, *self.launcher, "--model-path", str(self.model)]
        serve += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", MODEL_NAME]
        serve += ["--page-size", str(PAGE_TOKENS), "--enable-metrics", "--enable-cache-report"]
        serve += ["--admin-api-key", self.admin_key] if self.admin_key else []
        return [*serve, "--enable-hierarchical-cache"]

    def complete(self, prompt: Sequence[int], max_tokens: int = 16, **settings: Any) -> SglangAnswer:
        """Complete ``prompt`` (token ids) greedily; ``settings`` are further fields of the request."""
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
        body |= {"return_logprob": True, "top_logprobs_num": 5, **settings}
        first, last = 0.0, {}
        begin = time.perf_counter()
        for event in self.events("/generate", body):
            first, last = first or time.perf_counter() - begin, event  # each event repeats those before it
        seconds = time.perf_counter() - begin
        if "output_ids" not in last:
            raise ServerFailed(f"/generate answered {last}; see {self.log}")
        said = last["meta_info"]
        choices = [{token: score for score, token, _ in best} for best in said["output_top_logprobs"]]
        where = said.get("cached_tokens_details") or {}
        levels = [int(where.get(level) or 0) for level in ("device", "host", "storage")]
        return SglangAnswer(tuple(last["output_ids"]), tuple(choices), first, seconds, said["cached_tokens"], *levels)

    def wait_until_stored(self, pages: int, timeout: float = 60.0) -> None:
        """Wait until so many pages were stored since the server's start.  Raises ``TimeoutError``."""
        self.wait_for_metric(PAGES, pages, timeout, direction="put", result="stored")

    def flush_cache(self, timeout: float = 30.0) -> None:
        """Empty SGLang's device and host caches (L1 and L2), not the storage (L3).

        SGLang does it when it is idle; a server that is not in time refuses.  Raises ``ServerFailed``.
        """
        self.request("POST", f"/flush_cache?timeout={timeout:g}", headers=self._authorization())

    def attach(self, **keys: Any) -> None:
        """Attach umbp with the extra configuration ``keys`` to a server that runs.  Raises ``ServerFailed``."""
        body = {"hicache_storage_backend": "umbp", "hicache_storage_backend_extra_config_json": _json(keys)}
        body["hicache_storage_prefetch_policy"] = "wait_complete"
        self.request("PUT", _BACKEND, body, self._authorization())

    def detach(self) -> None:
        """Detach the storage; what is on SSD stays there.  Raises ``ServerFailed``."""
        self.request("DELETE", _BACKEND, headers=self._authorization())

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.admin_key}"} if self.admin_key else {}


def extra_config(**keys: Any) -> list[str]:
    """``--hicache-storage-backend umbp`` and its extra configuration, as arguments."""
    return ["--hicache-storage-backend", "umbp", "--hicache-storage-backend-extra-config", _json(keys)]


def cpu_environment() -> dict[str, str]:
    """What an SGLang on a machine without a GPU is started with; what the user has set stays.

    The shim in ``tests/sglang/shim`` stands for the copies between device and host that a CPU build does not have.
    """
    wanted = {
        "OMP_NUM_THREADS": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    shim = os.pathsep.join(filter(None, [str(_SHIM), os.environ.get("PYTHONPATH")]))
    return {name: os.environ.get(name, value) for name, value in wanted.items()} | {"PYTHONPATH": shim}


def cpu_arguments() -> list[str]:
    """The arguments that go with :func:`cpu_environment`."""
    arguments = ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    return [*arguments, "--disable-cuda-graph", "--hicache-ratio", "2"]


def cpu_only() -> bool:
    """Whether this machine has no device but its CPU, by the torch of this Python."""
    import torch

    return not torch.accelerator.is_available()


def restart_without_gpu() -> None:
    """Where there is no GPU, start this program again in :func:`cpu_environment`; before SGLang is imported."""
    if cpu_only() and "SGLANG_USE_CPU_ENGINE" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **cpu_environment()})


def _json(keys: Mapping[str, Any]) -> str:
    return json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in keys.items()})
