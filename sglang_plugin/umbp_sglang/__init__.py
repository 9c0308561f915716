"""Entry point of SGLang's plug-in group.

This release brings the pool to vLLM.  The entry point is registered already, so that an environment
that upgrades later needs no change; until then it does nothing.
"""

from __future__ import annotations

import logging

__all__ = ["register"]

_log = logging.getLogger(__name__)


def register() -> None:
    """Called by SGLang in every engine process; never raises, changes nothing, may be called repeatedly."""
    _log.debug("umbp: the SGLang adapter comes with a later release; nothing was registered")
