"""The engine over a daemon that hangs for a while and goes on."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from tests.connectors.daemon.processes import Stopped, client
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
        engine.store(PROMPT)
        assert engine.hits(PROMPT) >= len(PROMPT) - 4
        engine.drain()
        assert engine.reset_prefix_cache()
        with Stopped(daemon):
            for prompt in (PROMPT, OTHER, PROMPT):
                began = time.monotonic()
                assert engine.hits(prompt) == 0
                assert time.monotonic() - began < 10
                engine.step_until(lambda: not engine.pool.ledger.quarantined)
                engine.reset_prefix_cache()
        engine.step_until(engine.is_attached)
        engine.store(OTHER)
        assert engine.hits(OTHER) >= len(OTHER) - 4
