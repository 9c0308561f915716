"""Where our log lines go: inside an engine, and in a process of our own."""

from __future__ import annotations

import logging

PACKAGES = ("umbp_core", "umbp_connectors", "umbp_vllm", "umbp_sglang")


def join(parent: str, level: str) -> None:
    """Send what our packages log through the handlers of the engine's logger ``parent`` too, from ``level`` on.

    An engine configures its own logger and leaves the root alone, so that without this our lines would be
    lost below "warning" and unformatted above.  ``level`` also holds for our loggers below ``parent``
    (``<parent>.umbp``).  Idempotent; call it once per process, after the engine has set up its logging.
    """
    logging.getLogger(f"{parent}.umbp").setLevel(level.upper())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        for handler in logging.getLogger(parent).handlers:
            logger.addHandler(handler)


def log_to_stderr(level: str) -> None:
    """Send what our packages log to standard error.  For a process that is ours."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in PACKAGES:
        package = logging.getLogger(name)
        package.setLevel(level.upper())
        package.handlers = [handler]
