"""The stream of an engine over a connection that loses batches."""

from __future__ import annotations

from umbp_connectors.reporting.zmq_sequence import Event
from umbp_connectors.reporting.zmq_sockets import EngineStream, Happening

EVERY = 3


class LossyStream(EngineStream):
    """Loses every third batch that comes live, as a reader does that is too slow."""

    _seen = 0

    @property
    def lost(self) -> int:
        """How many batches."""
        return self._seen // EVERY

    def wait(self, timeout: float) -> list[Happening]:
        return [each for each in super().wait(timeout) if not self._is_lost(each)]

    def _is_lost(self, happening: Happening) -> bool:
        if happening.event is not Event.LIVE:
            return False
        self._seen += 1
        return self._seen % EVERY == 0
