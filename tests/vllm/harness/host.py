"""The harness over a host daemon: what the daemon holds takes the place of what the leader's directory does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.vllm.harness.errors import ConnectorFault, StuckTransfer
from tests.vllm.harness.fake_daemon import FakeDaemon
from tests.vllm.harness.rank import make_layers
from tests.vllm.harness.umbp import UmbpHarness
from umbp_vllm.host_pool import HostPool

HOST = {"mode": "daemon", "lookup_timeout_ms": 5000, "call_timeout_ms": 5000}
_MOST_WAITS = 20_000


class HostHarness(UmbpHarness):
    """An engine over ``daemon``, or over the real one at its configuration's socket."""

    def __init__(self, daemon: FakeDaemon | None, extra: dict[str, Any] | None = None, **spec: Any) -> None:
        self.daemon = daemon
        super().__init__({**HOST, **(extra or {})}, **spec)

    @property
    def host(self) -> HostPool:
        """What stands for the directory."""
        host = self.pool.host
        assert host is not None
        return host

    def settle(self) -> None:
        """Wait until the daemon has answered everything that was said."""
        for _ in range(_MOST_WAITS):
            self.pool.settle()
            if not (self.host.stock.pending or self.host.stock._taking or self.host.line.clearing):
                return
            self.yield_to_transfers()
        raise StuckTransfer(f"the daemon leaves {self.host.stats(0)} unanswered")  # type: ignore[arg-type]

    def store(self, prompt: Sequence[int]) -> None:
        """As any engine's, until the daemon has it."""
        super().store(prompt)
        self.settle()

    def drain(self) -> None:
        """As any engine's, until the daemon has answered."""
        super().drain()
        if self.daemon is None or (self.daemon.answers.is_set() and not self.daemon.down):
            self.settle()

    def check_stored(self) -> int:
        """Compare every object of a known prefix that the daemon holds, on every rank, with the model."""
        checked = 0
        if self.daemon is None:
            return checked
        with self.daemon.lock:
            held = dict(self.daemon.objects_of) if self.daemon.name else {}
            for rank, config in zip(self.ranks, self.geometry.ranks, strict=True):
                _, layers = make_layers(config, rank.rank % self.spec.tp)
                stripe = self.host.loans._stripes.of[rank.rank]
                for key, (group, states) in self._truths():
                    if key in self.rotten or key not in held:
                        continue
                    own = [layer for layer in layers if layer.group == group]
                    offsets = np.arange(len(states))
                    for layer in own:
                        layer.write(np.full_like(offsets, 1), offsets, states)
                    truth = np.concatenate([layer.cells[1].reshape(-1) for layer in own])
                    page, nbytes, _ = held[key]
                    if not np.array_equal(self.daemon.memory[page, stripe, :nbytes], truth):
                        raise ConnectorFault(f"rank {rank.rank}: object {key.hex()} in the daemon is not the model's")
                    checked += 1
        return checked
