"""Where the configuration comes from, and what was wrong with it.

Highest first: the engine's own extra-config, the environment (``UMBP_*``), a TOML file, the defaults.
A key that nobody knows, or a value of the wrong type, stops the start with a sentence that names the key,
the nearest known one and the place it came from.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from umbp_connectors.config_env import OURS_BUT_NO_KEY, is_foreign
from umbp_connectors.config_model import UmbpConfig, parse_size
from umbp_core.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

__all__ = ["ResolvedConfig", "UmbpConfig", "parse_size", "resolve"]

_log = logging.getLogger(__name__)

KEYS = tuple(UmbpConfig.model_fields)
ENV_KEYS = {UmbpConfig.env_name(key): key for key in KEYS} | {"UMBP_CONFIG": "config_file"}
"""Environment variable -> key; ``UMBP_CONFIG`` is short for ``UMBP_CONFIG_FILE``."""
EXTRA_ALIASES = {"cpu_bytes_to_use": "dram_capacity", "dram_bytes": "dram_capacity"}
"""Names under which the engine itself delivers a key (vLLM's ``--kv-offloading-size``)."""

EXTRA = "engine extra-config"
DEFAULT = "default"


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and, for each key, where its value came from."""

    config: UmbpConfig
    origins: Mapping[str, str]


@dataclass(frozen=True)
class _Given:
    """One value as it was found."""

    value: object
    origin: str


class _Layer:
    """The values of one source, and what was wrong with its names."""

    def __init__(self) -> None:
        self.values: dict[str, _Given] = {}
        self.problems: list[str] = []

    def add(self, key: str, value: object, origin: str) -> None:
        """Take ``value`` for ``key``; the same key under two names must agree."""
        before = self.values.get(key)
        if before is not None and before.value != value:
            self.problems.append(f"{key} is given twice and differently: by {before.origin} and by {origin}")
        self.values[key] = _Given(value, origin)

    def unknown(self, name: str, origin: str, known: list[str]) -> None:
        """Note that nobody knows ``name``."""
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "`umbp config` lists the known ones"
        self.problems.append(f"unknown key {name!r} in {origin}; {hint}")


def resolve(
    extra: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    file: str | os.PathLike[str] | None = None,
) -> ResolvedConfig:
    """The configuration of this process.

    ``extra`` is what the engine passes on from the user, ``env`` the environment (the process's own by
    default), ``file`` a TOML file (by default the one that ``config_file`` names in ``extra`` or ``env``).
    Raises ``ConfigError`` with one line per problem; nothing else.
    """
    layers = [_from_extra(extra or {}), _from_env(os.environ if env is None else env)]
    merged = _merge(layers)
    if file is not None:
        merged["config_file"] = _Given(str(file), "argument")
    if "config_file" in merged:
        layers.append(_from_file(Path(str(merged["config_file"].value)).expanduser()))
        merged = _merge(layers) | {"config_file": merged["config_file"]}
    problems = [problem for layer in layers for problem in layer.problems]
    config = _build(merged, problems)
    if config is None:
        raise ConfigError("\n".join(["the configuration of umbp cannot be used:", *(f"  - {p}" for p in problems)]))
    return ResolvedConfig(config, {key: merged[key].origin if key in merged else DEFAULT for key in KEYS})


def _merge(layers: list[_Layer]) -> dict[str, _Given]:
    """The values of ``layers``, the first of which wins."""
    merged: dict[str, _Given] = {}
    for layer in reversed(layers):
        merged.update(layer.values)
    return merged


def _from_extra(extra: Mapping[str, Any]) -> _Layer:
    layer = _Layer()
    for name, value in extra.items():
        key = EXTRA_ALIASES.get(name, name)
        if key not in UmbpConfig.model_fields:
            layer.unknown(name, EXTRA, [*KEYS, *EXTRA_ALIASES])
        elif value is not None:
            layer.add(key, value, EXTRA if key == name else f"{EXTRA} ({name})")
    return layer


def _from_env(env: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    foreign = []
    for name, value in env.items():
        if not name.startswith("UMBP_") or name in OURS_BUT_NO_KEY:
            continue
        if name in ENV_KEYS:
            if value.strip():  # empty means not set, as in the original
                layer.add(ENV_KEYS[name], value, f"environment {name}")
        elif is_foreign(name):
            foreign.append(name)
        else:
            layer.unknown(name, "the environment", [*ENV_KEYS, *OURS_BUT_NO_KEY])
    if foreign:
        _log.debug("umbp: not used by this release: %s", ", ".join(sorted(foreign)))
    return layer


def _from_file(path: Path) -> _Layer:
    layer = _Layer()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        layer.problems.append(f"config_file {path} cannot be read: {error.strerror}")
        return layer
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        layer.problems.append(f"config_file {path} is not TOML: {error}")
        return layer
    for name, value in content.items():
        if name in UmbpConfig.model_fields and name != "config_file":
            layer.add(name, value, f"file {path}")
        else:
            layer.unknown(name, f"file {path}", list(KEYS))
    return layer


def _build(merged: Mapping[str, _Given], problems: list[str]) -> UmbpConfig | None:
    """The model of ``merged``, or ``None`` when there are ``problems`` (to which its own are added)."""
    try:
        config = UmbpConfig.model_validate({key: given.value for key, given in merged.items()})
    except ValidationError as error:
        problems.extend(_explain(e["loc"], e["msg"], merged) for e in error.errors(include_url=False))
        return None
    return None if problems else config


def _explain(location: tuple[int | str, ...], message: str, merged: Mapping[str, _Given]) -> str:
    text = message.removeprefix("Value error, ")
    key = str(location[0]) if location else ""
    if key in merged:
        given = merged[key]
        return f"{key} = {given.value!r} from {given.origin}: {text[:1].lower()}{text[1:]}"
    named = [f"{name} from {given.origin}" for name, given in merged.items() if name in text]
    return f"{text} ({'; '.join(named)})"
