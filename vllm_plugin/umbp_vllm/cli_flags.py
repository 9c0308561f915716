"""``--kv-connector umbp`` and ``--kv-offloading-backend umbp`` on vLLM's command lines.

What the options say is combined into ``namespace.kv_transfer_config`` while parsing, in whatever order they
come: the namespace must be complete by itself, because vLLM pickles it for its API server processes.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from umbp_core.errors import ConfigError
from umbp_vllm.engine_args import CONNECTOR, ROLE, with_chosen_policy, with_connector

FLAG = "--kv-connector"
_CONFIG_FLAG = "--kv-transfer-config"
_BACKEND_FLAG = "--kv-offloading-backend"
_GROUP = "VllmConfig"
_HELP = (
    "Keep KV in the umbp pool (DRAM and SSD). Short for --kv-transfer-config with this connector and the role "
    "kv_both; --kv-transfer-config.kv_connector_extra_config.KEY VALUE sets its options. Added by umbp-connectors."
)
_logger = logging.getLogger(__name__)


def extending(add_cli_args: Callable[..., Any], arg_utils: Any) -> Callable[..., Any]:
    """``EngineArgs.add_cli_args`` that adds our options after vLLM's own."""

    @functools.wraps(add_cli_args)
    def add_all_cli_args(*args: Any, **kwargs: Any) -> Any:
        parser = add_cli_args(*args, **kwargs)
        try:
            extend(parser, vars(arg_utils).get("_expand_json_human_readable_numbers", str))
        except Exception:  # engine boundary: any vLLM must still parse its own arguments
            _logger.debug("umbp: this vLLM takes no %s; use %s", FLAG, _CONFIG_FLAG, exc_info=True)
        return parser

    return add_all_cli_args


def extend(parser: argparse.ArgumentParser, expand_numbers: Callable[[str], str] = str) -> None:
    """Add the options to ``parser``, unless it already has ``--kv-connector``.

    ``expand_numbers`` turns literals such as ``4G`` in vLLM's JSON arguments into numbers.  Raises ``KeyError``
    when the parser does not have vLLM's options; nothing was changed then.
    """
    options = parser._option_string_actions
    if FLAG in options:
        return
    config, backend = options[_CONFIG_FLAG], options[_BACKEND_FLAG]
    given = _Given()
    _take_over(config, _ConfigAction, given)
    config.type = _completing(_callable(config.type), expand_numbers)
    _take_over(backend, _BackendAction, given)
    if backend.choices is not None:
        backend.choices = [*backend.choices, CONNECTOR]
    group = next((group for group in parser._action_groups if group.title == _GROUP), parser)
    flag = group.add_argument(FLAG, action=_ConnectorAction, choices=[CONNECTOR], default=argparse.SUPPRESS, help=_HELP)
    vars(flag)["given"] = given


@dataclass
class _Given:
    """What the options said so far in one parse; the namespace tells one parse from the next."""

    namespace: argparse.Namespace | None = None
    config: Any = None
    connector: str | None = None
    backend: str | None = None

    def start(self, namespace: argparse.Namespace) -> None:
        if self.namespace is not namespace:
            self.namespace, self.config, self.connector, self.backend = namespace, None, None, None

    def combined(self) -> Any:
        """The ``KVTransferConfig`` of everything given, or ``None``.  Raises ``ConfigError``."""
        named = self.connector or (None if self.config is None else self.config.kv_connector)
        if self.backend is not None and named is not None and (self.backend == CONNECTOR) != (named == CONNECTOR):
            raise ConfigError(f"{_BACKEND_FLAG} {self.backend} and the connector {named!r} exclude each other")
        if self.connector is None:
            return self.config
        return with_connector(self.config, self.connector)


class _CombiningAction(argparse.Action):
    """Base of the three actions: note in ``given`` what the option said, then write the combination."""

    given: _Given
    keeps: str

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        self.given.start(namespace)
        setattr(self.given, self.keeps, values)
        try:
            config = self.given.combined()
        except ConfigError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        if config is not None:
            namespace.kv_transfer_config = config


class _ConnectorAction(_CombiningAction):
    keeps = "connector"


class _ConfigAction(_CombiningAction):
    keeps = "config"


class _BackendAction(_CombiningAction):
    keeps = "backend"

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, values)


def _take_over(action: argparse.Action, kind: type[_CombiningAction], given: _Given) -> None:
    """Make vLLM's option one of ours, with all that vLLM has set on it."""
    action.__class__ = kind
    vars(action)["given"] = given


def _callable(parse: Any) -> Callable[[str], Any]:
    if not callable(parse):
        raise TypeError(f"{_CONFIG_FLAG} has no parser of its own")
    return parse  # type: ignore[no-any-return]


def _completing(parse: Callable[[str], Any], expand_numbers: Callable[[str], str]) -> Callable[[str], Any]:
    """``parse``, where a config that names our connector needs no ``kv_role`` and keeps the failure policy it names."""

    @functools.wraps(parse)
    def parse_transfer_config(text: str) -> Any:
        try:
            values = json.loads(expand_numbers(text))
        except ValueError:
            return parse(text)
        if not isinstance(values, dict):
            return parse(text)
        if values.get("kv_connector") == CONNECTOR and values.get("kv_role") is None:
            text = json.dumps({**values, "kv_role": ROLE})
        return with_chosen_policy(parse(text), values)

    return parse_transfer_config
