"""Where a LoRA adapter comes from, told so that equal adapters are told alike and others are not."""

from __future__ import annotations

import importlib
from pathlib import Path

from umbp_connectors.model_origin import model_origin

_CONFIG = "adapter_config.json"
_CONFIG_FILES = (_CONFIG, "added_tokens.json")


def adapter_origin(path: str) -> dict[str, object]:
    """What :func:`model_origin` tells of the adapter's weights, and digests of the files that say how to apply them."""
    folder = _folder(path)
    configs = [Path(folder) / name for name in _CONFIG_FILES]
    return {
        "weights": model_origin(folder, None),
        "configs": {file.name: model_origin(str(file), None)["files"] for file in configs if file.is_file()},
    }


def _folder(path: str) -> str:
    """Where the adapter's files lie: ``path``, or for a hub's repository what the Hugging Face cache holds of it."""
    if Path(path).is_dir():
        return path
    hub = importlib.import_module("huggingface_hub")
    try:
        found = hub.try_to_load_from_cache(path, _CONFIG)
    except ValueError:  # not a name that a hub's repository could have
        return path
    return str(Path(found).parent) if isinstance(found, str) else path
