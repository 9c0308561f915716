"""What every configuration of ours has in common: sources that rank, origins, and sentences about what is wrong.

The engine's (:mod:`umbp_connectors.config`) and the master's (:mod:`umbp_connectors.master.settings`) are made of
these.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from umbp_core.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

DEFAULT = "default"
_PREFIX = "UMBP_"

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Given:
    """One value as it was found."""

    value: object
    origin: str


class Layer:
    """The values of one source, and what was wrong with its names.

    ``advice`` is told where no known name is near an unknown one.
    """

    def __init__(self, advice: str = "`umbp config` lists the known ones") -> None:
        self.values: dict[str, Given] = {}
        self.problems: list[str] = []
        self._advice = advice

    def add(self, key: str, value: object, origin: str) -> None:
        """Take ``value`` for ``key``; the same key under two names must agree."""
        before = self.values.get(key)
        if before is not None and before.value != value:
            self.problems.append(f"{key} is given twice and differently: by {before.origin} and by {origin}")
        self.values[key] = Given(value, origin)

    def unknown(self, name: str, origin: str, known: Iterable[str]) -> None:
        """Note that nobody knows ``name``."""
        rest = {each.removeprefix(_PREFIX): each for each in known}  # what all have in common makes none the nearest
        near = difflib.get_close_matches(name.removeprefix(_PREFIX), rest, n=1, cutoff=0.5)
        hint = f"did you mean {rest[near[0]]!r}?" if near else self._advice
        self.problems.append(f"unknown key {name!r} in {origin}; {hint}")


def read_environment(
    layer: Layer,
    env: Mapping[str, str],
    known: Mapping[str, str],
    is_foreign: Callable[[str], bool],
    no_keys: Collection[str] = (),
    of_others: Collection[str] = (),
) -> list[str]:
    """Put the variables of ``env`` that begin with ``UMBP_`` into ``layer``; ``known`` maps them to keys.

    ``no_keys`` are read elsewhere; a misspelt name may be near one of ``of_others``, too.  Returns the names that
    ``is_foreign`` accepts and nobody uses.  An empty variable counts as not set, as in the original.
    """
    foreign = []
    for name, value in env.items():
        if not name.startswith(_PREFIX) or name in no_keys:
            continue
        if name in known:
            if value.strip():
                layer.add(known[name], value, f"environment {name}")
        elif is_foreign(name):
            foreign.append(name)
        else:
            layer.unknown(name, "the environment", [*known, *no_keys, *of_others])
    return foreign


def read_file(layer: Layer, path: Path, keys: Collection[str]) -> None:
    """Put the TOML file ``path``, which may hold any of ``keys``, into ``layer``."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        layer.problems.append(f"config_file {path} cannot be read: {error.strerror}")
        return
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        layer.problems.append(f"config_file {path} is not TOML: {error}")
        return
    for name, value in content.items():
        if name == "config_file":
            layer.problems.append(f"config_file in file {path}: a file names no other one; leave it out")
        elif name in keys:
            layer.add(name, value, f"file {path}")
        else:
            layer.unknown(name, f"file {path}", keys)


def merge(layers: list[Layer]) -> dict[str, Given]:
    """The values of ``layers``, the first of which wins."""
    merged: dict[str, Given] = {}
    for layer in reversed(layers):
        merged.update(layer.values)
    return merged


def build(model: type[Model], merged: Mapping[str, Given], problems: list[str], whose: str) -> Model:
    """The ``model`` of ``merged``.

    Raises ``ConfigError`` with one line per problem, those of ``problems`` first; ``whose`` names the configuration.
    The value of a field with ``repr=False`` is a secret and is not told.
    """
    config = None
    try:
        config = model.model_validate({key: given.value for key, given in merged.items()})
    except ValidationError as error:
        problems = problems + [_explain(model, e["loc"], e["msg"], merged) for e in error.errors(include_url=False)]
    if config is None or problems:
        raise ConfigError("\n".join([f"the configuration of {whose} cannot be used:", *(f"  - {p}" for p in problems)]))
    return config


def origins(keys: Iterable[str], merged: Mapping[str, Given]) -> dict[str, str]:
    """Where each of ``keys`` came from."""
    return {key: merged[key].origin if key in merged else DEFAULT for key in keys}


def _explain(model: type[BaseModel], location: tuple[int | str, ...], message: str, merged: Mapping[str, Given]) -> str:
    text = message.removeprefix("Value error, ")
    key = str(location[0]) if location else ""
    if key in merged:
        given = merged[key]
        value = repr(given.value) if model.model_fields[key].repr else "(secret)"
        return f"{key} = {value} from {given.origin}: {text[:1].lower()}{text[1:]}"
    named = [f"{name} from {given.origin}" for name, given in merged.items() if name in text]
    return f"{text} ({'; '.join(named)})"
