"""Where a LoRA adapter comes from, told so that equal adapters are told alike and others are not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

from umbp_connectors.model_origin import model_origin

_CONFIG = "adapter_config.json"
_CONFIG_FILES = (_CONFIG, "added_tokens.json")


class AdapterOrigin(NamedTuple):
    """An adapter: what :func:`model_origin` tells of its weights, and digests of the files that say how to apply them.

    An adapter whose files are not to be read has no ``configs``.
    """

    weights: dict[str, object]
    configs: dict[str, object]


def adapter_origin(path: str) -> AdapterOrigin:
    """What an engine loads when it is told ``path``: a folder, or a hub's repository in the Hugging Face cache.

    Reads files.  Raises ``OSError`` when one of the weights cannot be looked at.
    """
    folder = _folder(path)
    files = [folder / name for name in _CONFIG_FILES]
    configs = {file.name: model_origin(str(file), None)["files"] for file in files if file.is_file()}
    return AdapterOrigin(model_origin(str(folder), None), configs)


def _folder(path: str) -> Path:
    """Where the adapter's files lie; ``path`` itself where they are not to be found."""
    local = Path(path).expanduser()
    if local.exists() or local.is_absolute():
        return local
    hub = importlib.import_module("huggingface_hub")
    try:
        found = hub.try_to_load_from_cache(path, _CONFIG)
    except ValueError:  # not a name that a hub's repository could have
        return local
    return Path(found).parent if isinstance(found, str) else local
