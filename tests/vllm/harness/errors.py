"""What the harness can find wrong with a connector; every finding is one of these."""

from __future__ import annotations


class ConnectorFault(AssertionError):
    """Base of every finding; an ``AssertionError`` so that a test fails without further ado."""


class KVMismatch(ConnectorFault):
    """A forward pass would have read KV that does not belong to its token prefix (laws L1 and L3)."""


class ReportFault(ConnectorFault):
    """A report to the scheduler that vLLM does not allow: unknown id, twice, or in the wrong set (law L6)."""


class StuckTransfer(ConnectorFault):
    """The engine did not become idle within its bounds: some op never ended (law L4)."""


class LeakDetected(ConnectorFault):
    """Blocks, slots or pins are still held although the engine is idle."""
