"""The engine over a daemon that hangs for a while and goes on."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from tests.connectors.daemon.processes import Stopped, client
from tests.connectors.waiting import PATIENCE
from tests.vllm.harness.host import HostHarness

PROMPT = list(range(1, 97))
OTHER = list(range(200, 296))
CALL_MS, LOOKUP_MS = 300, 100


def test_a_daemon_that_hangs_costs_hits_only_and_serves_again(tmp_path: Path) -> None:
    """Tokens are compared with those of a run without a cache, each time."""
    path = tmp_path / "run" / "daemon.sock"
    with contextlib.ExitStack() as closing:
        daemon = client("serve", path)
        closing.callback(daemon.kill)
        times = {"call_timeout_ms": CALL_MS, "lookup_timeout_ms": LOOKUP_MS}
        engine = HostHarness(None, {"daemon_socket": str(path), "dram_capacity": "1MiB", **times})
        closing.callback(engine.close)
        engine.step_until(lambda: is_served(engine, PROMPT))
        engine.drain()
        assert engine.reset_prefix_cache()
        with Stopped(daemon):
            for prompt in (PROMPT, OTHER, PROMPT):
                began = time.monotonic()
                assert engine.hits(prompt) == 0
                assert time.monotonic() - began < PATIENCE
                engine.step_until(lambda: not engine.pool.ledger.quarantined)
                engine.reset_prefix_cache()
        engine.step_until(lambda: is_served(engine, OTHER))


def is_served(engine: HostHarness, prompt: list[int]) -> bool:
    """Whether a prompt that was stored comes from the daemon, which may be too slow for these times once or twice."""
    engine.store(prompt)
    return engine.hits(prompt) >= len(prompt) - 4
