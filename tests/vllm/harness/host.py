"""The harness over a host daemon: what the daemon holds takes the place of what the leader's directory does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.vllm.harness.engine import MAX_SECONDS
from tests.vllm.harness.errors import ConnectorFault, StuckTransfer
from tests.vllm.harness.fake_daemon import FakeDaemon
from tests.vllm.harness.rank import make_layers, object_of
from tests.vllm.harness.spec import EngineSpec, make_geometry, make_vllm_config
from tests.vllm.harness.umbp import EXTRA, UmbpHarness
from umbp_core.tiers import Tier
from umbp_vllm import host_setup
from umbp_vllm.host_pool import HostPool
from umbp_vllm.host_stages import StagePages, pages_of
from umbp_vllm.layout_groups import geometry_of

HOST = {"mode": "daemon", "lookup_timeout_ms": 60_000, "call_timeout_ms": 60_000}


def stages_of(spec: EngineSpec) -> tuple[StagePages, ...]:
    """What the stages of such an engine tell each other over vLLM's process groups, which there are none of here."""
    vllm_config = make_vllm_config(spec)
    firsts = make_geometry(spec, vllm_config).ranks[:: spec.tp]
    return tuple(
        pages_of(config, geometry_of(config, make_layers(config, 0)[0]), spec.tp, vllm_config) for config in firsts
    )


class HostHarness(UmbpHarness):
    """An engine over ``daemon``, or over the real one at its configuration's socket."""

    def __init__(self, daemon: FakeDaemon | None, extra: dict[str, Any] | None = None, **spec: Any) -> None:
        self.daemon = daemon
        whole = {**HOST, **(extra or {})}

        def share(look: Callable[[], StagePages], count: int) -> tuple[StagePages, ...]:
            if count == 1:
                return (look(),)
            own, stages = look(), stages_of(EngineSpec("umbp", extra={**EXTRA, **whole}, **spec))
            assert len(stages) == count
            assert own in stages
            return stages

        with patch.object(host_setup, "share_stages", share):
            super().__init__(whole, **spec)

    @property
    def host(self) -> HostPool:
        """What stands for the directory."""
        host = self.pool.host
        assert host is not None
        return host

    def hits(self, prompt: Sequence[int], max_tokens: int = 3) -> float:
        """Run one request to its end (which compares its tokens with a run without a cache); its hit tokens."""
        before = self.stat("hit_tokens", "dram")
        self.add(prompt, max_tokens=max_tokens)
        self.run_until_finished()
        return self.stat("hit_tokens", "dram") - before

    def is_attached(self) -> bool:
        """Have steps planned, which is how ranks hear of an arena; whether the daemon's pool can be used."""
        self.hits([7, 8, 9], max_tokens=1)
        return self.host.line.usable

    def settle(self) -> None:
        """Wait until the daemon has answered everything that was said."""
        deadline = time.monotonic() + MAX_SECONDS
        self.pool.settle()
        while self.host.stock.pending or self.host.stock._taking or self.host.line.clearing:
            if time.monotonic() > deadline:
                raise StuckTransfer(f"the daemon leaves {self.host.stats(Tier.DRAM)} unanswered")
            self.yield_to_transfers()
            self.pool.settle()

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
                    page, nbytes, _ = held[key]
                    right = object_of(layers, group, states)
                    if not np.array_equal(self.daemon.memory[page, stripe, : min(nbytes, len(right))], right):
                        raise ConnectorFault(f"rank {rank.rank}: object {key.hex()} in the daemon is not the model's")
                    checked += 1
        return checked
