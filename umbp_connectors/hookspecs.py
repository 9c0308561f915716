"""The hooks of umbp-connectors."""

from __future__ import annotations

import pluggy

PROJECT_NAME = "umbp"
hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)
