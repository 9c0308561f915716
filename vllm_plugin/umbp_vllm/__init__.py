"""The KV-cache pool as a vLLM connector: ``vllm serve MODEL --kv-connector umbp``.

The two functions here are vLLM entry points and run in every process of every engine of the environment,
also in those that do not use the pool.  Therefore importing this package imports neither torch nor vLLM,
and neither function ever raises: what fails costs convenience, and one line in the log.
"""

from __future__ import annotations

import logging

_logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point of ``vllm.general_plugins``: make the connector and its flags known.  Idempotent."""
    try:
        from umbp_vllm import registration

        registration.register()
    except Exception:  # engine boundary: an entry point of every vLLM, whether it uses us or not
        _logger.warning("umbp could not be registered; vLLM goes on without it", exc_info=True)


def early_platform() -> None:
    """Entry point of ``vllm.platform_plugins``: make ``LLM(kv_connector="umbp")`` work.  Idempotent.

    Brings no platform.  It only is the earliest moment that vLLM offers: ``EngineArgs`` does not exist yet.
    """
    try:
        from umbp_vllm import early

        early.install()
    except Exception:  # engine boundary: the same
        _logger.debug("umbp: no early hook; LLM(kv_connector=...) is not available", exc_info=True)
