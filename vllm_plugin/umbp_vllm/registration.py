"""What ``register()`` does: the connector's name in vLLM's factory, and the flags in vLLM's argument classes."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping

from umbp_vllm import engine_args

NO_CLI_HOOK = "UMBP_VLLM_NO_CLI_HOOK"
"""Kill switch: with this variable set, only ``--kv-transfer-config`` with a complete JSON starts the connector."""

_MODULE = "umbp_vllm.connector"
_CLASS = "UmbpConnector"
_logger = logging.getLogger(__name__)


def register() -> None:
    """Register the connector, then the flags; without the flags the JSON form still works.

    Raises what importing vLLM's factory raises.
    """
    register_connector()
    if hooks_wanted(os.environ):
        install_hooks()


def register_connector() -> None:
    """Make ``umbp`` known to ``KVConnectorFactory``, unless the name is taken.  Imports no connector yet."""
    factory = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.factory").KVConnectorFactory
    if engine_args.CONNECTOR not in factory._registry:
        factory.register_connector(engine_args.CONNECTOR, _MODULE, _CLASS)


def hooks_wanted(env: Mapping[str, str]) -> bool:
    """Whether vLLM's argument classes may be changed in memory."""
    return env.get(NO_CLI_HOOK, "").strip().lower() in {"", "0", "false", "no", "off"}


def install_hooks() -> None:
    """Add the flags and the keyword argument; on a vLLM where that does not fit, say so at debug level."""
    try:
        engine_args.install(importlib.import_module("vllm.engine.arg_utils"))
    except Exception:  # engine boundary: vLLM calls this in every process, and works without the flags
        _logger.debug("umbp: this vLLM takes no --kv-connector; use --kv-transfer-config", exc_info=True)
