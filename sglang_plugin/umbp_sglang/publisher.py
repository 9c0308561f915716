"""The publisher of SGLang's KV events that tells our master, and passes everything on to another one."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.kv_events import EventBatch, EventPublisher

from umbp_sglang.reporting import NodeReporting
from umbp_sglang.reporting_hooks import quiet

__all__ = ["UmbpEventPublisher"]


class UmbpEventPublisher(EventPublisher):
    """Tells ``reporting`` what the tree did, after ``inner``, SGLang's own publisher, was told if there is one.

    ``publish`` is called by the scheduler's thread after each step.
    """

    def __init__(self, inner: EventPublisher | None = None) -> None:
        self.inner = inner
        self.reporting: NodeReporting | None = None

    def publish(self, events: EventBatch) -> None:
        """Emit events in order."""
        if self.inner is not None:
            self.inner.publish(events)
        self._tell(events)

    @quiet
    def _tell(self, events: EventBatch) -> None:
        if self.reporting is not None:
            self.reporting.tell_events(events.events)

    def shutdown(self) -> None:
        """Tell no more."""
        if self.inner is not None:
            self.inner.shutdown()
        if self.reporting is not None:
            self.reporting.release("events")
            self.reporting = None

    def describe_local_source(self, block_size: int) -> dict[str, Any] | None:
        """Where a process of this machine can read the events: what the inner publisher says."""
        if self.inner is None:
            return None
        source: dict[str, Any] | None = self.inner.describe_local_source(block_size)
        return source
