"""The host of the pool: configuration, plug-ins, tiers, transfer, command line.

Knows no engine and no torch.  The names below are what adapters and authors of plug-ins use.
"""

from __future__ import annotations

from umbp_connectors._version import __version__
from umbp_connectors.config import ResolvedConfig, UmbpConfig, resolve
from umbp_connectors.hookspecs import PROJECT_NAME, hookimpl

__all__ = ["PROJECT_NAME", "ResolvedConfig", "UmbpConfig", "__version__", "hookimpl", "resolve"]
