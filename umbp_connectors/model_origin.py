"""Where a model's weights come from, told so that equal weights are told alike and others are not.

An engine's name for a model does not say which weights it has: a folder may hold new ones under the old path.  Both
adapters put what stands here into the identity of what they store.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

_CONFIG_FILES = ("config.json", "params.json", "hf_quant_config.json")
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_CACHED_FILES = ("config.json", "params.json", "model.safetensors.index.json", "model.safetensors")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SNAPSHOT = re.compile(r"models--(?P<repository>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")
_SAMPLE_BYTES = 4096
_SAMPLES = 512


def model_origin(model: str, revision: str | None) -> dict[str, object]:
    """Where weights come from: a hub's repository at a commit, a local path with its files, or only a name.

    A snapshot in the Hugging Face cache is its repository, because vLLM names it by path when it is offline and
    by repository when it is not.  A branch such as ``main`` counts by the commit that the cache holds for it.
    """
    snapshot = _SNAPSHOT.search(model)
    name = snapshot["repository"].replace("--", "/") if snapshot else model
    commit = snapshot["commit"] if snapshot else _cached_commit(model, revision)
    return {
        "name": name,
        "commit": commit,
        "revision": "" if commit else revision or "",
        "files": None if commit else _files(model),
    }


def _cached_commit(model: str, revision: str | None) -> str:
    """The commit of a hub's repository, if a file of it is in the Hugging Face cache, else an empty text."""
    if not _REPOSITORY.fullmatch(model) or Path(model).exists():
        return ""
    hub = importlib.import_module("huggingface_hub")
    for file in _CACHED_FILES:
        path = hub.try_to_load_from_cache(model, file, revision=revision)
        found = _SNAPSHOT.search(str(Path(path).parent)) if isinstance(path, str) else None
        if found is not None:
            return found["commit"]
    return ""


def _files(model: str) -> dict[str, str] | None:
    """Digests of a local model's configuration and weights; ``None`` for the name of a remote one.

    The weights count by file name, size and samples of their bytes, so that new weights under an old path
    are noticed without reading all of them.  Times do not count: a copy is the same model.
    """
    root = Path(model)
    if not model:
        return None
    if root.is_file():
        return {"config": "", "weights": _digest(_weights([root]))}
    if not root.is_dir():
        return None
    weights = sorted(path for path in root.iterdir() if path.suffix in _WEIGHT_SUFFIXES and path.is_file())
    return {"config": _digest(_configs(root)), "weights": _digest(_weights(weights))}


def _configs(root: Path) -> Iterator[bytes]:
    for name in _CONFIG_FILES:
        path = root / name
        if path.is_file():
            yield name.encode()
            yield _read(path)


def _weights(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        size = path.stat().st_size
        yield path.name.encode()
        yield str(size).encode()
        yield from _samples(path, size, max(2, _SAMPLES // len(paths)))


def _samples(path: Path, size: int, count: int) -> Iterator[bytes]:
    """``count`` pieces from the first to the last byte of a file, or all of a small one."""
    try:
        with path.open("rb") as file:
            if size <= count * _SAMPLE_BYTES:
                yield file.read()
                return
            for index in range(count):
                file.seek((size - _SAMPLE_BYTES) * index // (count - 1))
                yield file.read(_SAMPLE_BYTES)
    except OSError:
        yield b""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _digest(parts: Iterator[bytes]) -> str:
    """SHA-256 of ``parts`` with their lengths, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
