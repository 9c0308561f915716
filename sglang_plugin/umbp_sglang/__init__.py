"""The KV-cache pool as SGLang's L3: ``--enable-hierarchical-cache --hicache-storage-backend umbp``.

:func:`register` is an entry point of SGLang and runs in every process of every server of the environment, also in those
that do not use the pool.  Therefore importing this package imports neither torch nor SGLang, and the function never
raises: what fails costs convenience, and one line in the log.
"""

from __future__ import annotations

import logging

__all__ = ["register"]

_logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point of ``sglang.srt.plugins``: make the backend's name known.  Idempotent."""
    try:
        from umbp_sglang import registration

        registration.register()
    except Exception:  # engine boundary: it starts also where nothing of ours works
        _logger.warning("umbp could not be registered; SGLang goes on without it", exc_info=True)
