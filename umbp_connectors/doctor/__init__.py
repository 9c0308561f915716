"""``umbp doctor``: what stands between this machine and a working pool, and what to do about it."""

from __future__ import annotations

from umbp_connectors.doctor.findings import Finding, Status, examine

__all__ = ["Finding", "Status", "examine"]
