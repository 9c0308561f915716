"""Where the configuration comes from, and what was wrong with it.

Highest first: the engine's own extra-config, the environment (``UMBP_*``), a TOML file, the defaults.
A key that nobody knows, or a value of the wrong type, stops the start with a sentence that names the key,
the nearest known one and the place it came from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbp_connectors.config_env import OF_OTHERS, OURS_BUT_NO_KEY, is_foreign
from umbp_connectors.config_layers import Given, Layer, build, merge, origins, read_environment, read_file
from umbp_connectors.config_model import UmbpConfig, parse_size

__all__ = ["ResolvedConfig", "UmbpConfig", "parse_size", "resolve"]

_log = logging.getLogger(__name__)

KEYS = tuple(UmbpConfig.model_fields)
_OF_THE_ORIGINAL = {
    f"UMBP_{tier}_{end}_WM": f"{tier}_{end}_watermark".lower() for tier in ("DRAM", "SSD") for end in ("HIGH", "LOW")
}
ENV_KEYS = {**_OF_THE_ORIGINAL, **{UmbpConfig.env_name(key): key for key in KEYS}, "UMBP_CONFIG": "config_file"}
"""Environment variable -> key; ``UMBP_CONFIG`` is short for ``UMBP_CONFIG_FILE``; some have a name of UMBP's too."""
EXTRA_ALIASES = {"cpu_bytes_to_use": "dram_capacity", "dram_bytes": "dram_capacity"}
"""Names under which the engine itself delivers a key (vLLM's ``--kv-offloading-size``)."""

EXTRA = "engine extra-config"
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and, for each key, where its value came from."""

    config: UmbpConfig
    origins: Mapping[str, str]


def resolve(
    extra: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    file: str | os.PathLike[str] | None = None,
    engine_keys: Collection[str] = (),
    giver: str = EXTRA,
) -> ResolvedConfig:
    """The configuration of this process.

    ``extra`` is what the engine passes on from the user, ``env`` the environment (the process's own by
    default), ``file`` a TOML file (by default the one that ``config_file`` names in ``extra`` or ``env``).
    ``engine_keys`` are names in ``extra`` that the engine itself reads; they are left alone.  ``giver`` is what the
    origin of ``extra`` is called.
    Raises ``ConfigError`` with one line per problem; nothing else.
    """
    layers = [_from_extra(extra or {}, engine_keys, giver), _from_env(os.environ if env is None else env)]
    merged = merge(layers)
    if file is not None:
        merged["config_file"] = Given(str(file), "argument")
    if "config_file" in merged:
        layers.append(_from_file(Path(str(merged["config_file"].value)).expanduser()))
        merged = merge(layers) | {"config_file": merged["config_file"]}
    config = build(UmbpConfig, merged, [problem for layer in layers for problem in layer.problems], "umbp")
    return ResolvedConfig(config, origins(KEYS, merged))


def _from_extra(extra: Mapping[str, Any], engine_keys: Collection[str], giver: str) -> Layer:
    layer = Layer()
    for name, value in extra.items():
        key = EXTRA_ALIASES.get(name, name)
        if name in engine_keys:
            continue
        if key not in UmbpConfig.model_fields:
            layer.unknown(name, giver, [*KEYS, *EXTRA_ALIASES, *engine_keys])
        elif value is not None:
            layer.add(key, value, giver if key == name else f"{giver} ({name})")
    return layer


def _from_env(env: Mapping[str, str]) -> Layer:
    layer = Layer()
    foreign = read_environment(layer, env, ENV_KEYS, is_foreign, OURS_BUT_NO_KEY, OF_OTHERS)
    if foreign:
        _log.debug("umbp: not used by this release: %s", ", ".join(sorted(foreign)))
    return layer


def _from_file(path: Path) -> Layer:
    layer = Layer()
    read_file(layer, path, KEYS)
    return layer
