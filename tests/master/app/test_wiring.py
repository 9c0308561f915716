"""What a master's process is made of where only the process can show it: its clock and its loop."""

from pathlib import Path

import pytest

from tests.master.app.master_process import CALL, DEADLINE, UMBP, MasterProcess
from umbp_core.master.model import NodeStatus, Registration
from umbp_core.tiers import Tier

JUMPING = """
import itertools, time
years = itertools.count(0, 365 * 86400)
time.time = lambda: float(next(years) % (100 * 365 * 86400))
"""
"""A wall clock that is a year later with each look at it, and now and then a century back."""
BRIEF = {"UMBP_HEARTBEAT_TTL_SEC": "60", "UMBP_REAPER_INTERVAL_SEC": "0.05", "UMBP_HIT_INDEX_GC_INTERVAL_SEC": "0.05"}

TOLD = """
import asyncio, sys
from umbp_connectors.master.app import MasterApp
run = MasterApp.run
async def told(self, *given):
    sys.stderr.write(f"on a loop of {type(asyncio.get_running_loop()).__module__}")
    await run(self, *given)
MasterApp.run = told
"""


def test_a_wall_clock_that_jumps_makes_nobody_expire(tmp_path: Path) -> None:
    """The original's times are the wall clock's: a jump is a mass expiry, or leases without end."""
    with MasterProcess(tmp_path, code=JUMPING + UMBP, **BRIEF) as master:
        client = master.native()
        client.register(Registration("n1"), CALL)
        client.report("n1", [b"a"], Tier.HBM, CALL)
        for hits in range(1, 200):
            (match,) = client.match([b"a"], True, CALL)
            assert match.tiers == {Tier.HBM: [b"a"]}
            assert client.hit_counts([b"a"], CALL) == [(b"a", hits)]
        (info,) = client.list_nodes(CALL)
        assert (info.status, info.last_heartbeat_age < DEADLINE) == (NodeStatus.ALIVE, True)
        client.close()
        assert master.end() == 0


@pytest.mark.parametrize(
    ("hidden", "loop"), [("", "uvloop"), ("import sys; sys.modules['uvloop'] = None\n", "asyncio")]
)
def test_the_loop_is_that_of_uvloop_where_it_is_installed(tmp_path: Path, hidden: str, loop: str) -> None:
    pytest.importorskip("uvloop")
    with MasterProcess(tmp_path, "--listen=none", code=hidden + TOLD + UMBP) as master:
        assert master.says(f"on a loop of {loop}")
        assert master.end() == 0
