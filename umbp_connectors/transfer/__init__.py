"""Moving bytes on one worker: the engine that executes what the core's transfer scheduler releases."""

from __future__ import annotations

from umbp_connectors.transfer.engine import TransferEngine
from umbp_core.scheduler import Limits

__all__ = ["Limits", "TransferEngine"]
