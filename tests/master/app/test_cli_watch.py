"""``umbp watch`` against a real master: changes as they come, filtered, over the master's restart."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.master.app.master_process import CALL, DEADLINE, UMBP, MasterProcess, environment, running_umbp
from umbp_core.master.model import Registration
from umbp_core.tiers import Tier


class Watching:
    """A running ``umbp watch`` and the lines that it prints."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def line(self) -> str:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, "the watch ended"
        return text.rstrip("\n")

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.line())
        assert told.pop("time") > 0
        return told

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The next lines, which are of these kinds."""
        found = [self.told() for _ in kinds]
        assert [each["event"] for each in found] == list(kinds)
        return found


@contextmanager
def watching(folder: Path, master: MasterProcess, *arguments: str) -> Iterator[Watching]:
    door = f"umbp://{master.doors['native']}"
    with running_umbp(folder, "watch", "--master", door, "--timeout", str(CALL), *arguments) as process:
        yield Watching(process)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MasterProcess]:
    with MasterProcess(tmp_path_factory.mktemp("watch"), UMBP_HEARTBEAT_TTL_SEC="3600") as running:
        client = running.native()
        for node in ("a:dp0", "a:dp1", "[::1]:9"):
            client.register(Registration(node), CALL)
        client.close()
        yield running
        assert running.end() == 0


def test_changes_for_programs(tmp_path: Path, master: MasterProcess) -> None:
    client = master.native()
    client.report("a:dp0", [b"before"], Tier.HBM, CALL)
    with watching(tmp_path, master, "--json", "--changes", "3") as watch:
        connected, following = watch.events("connected", "following")
        assert connected["master"] == following["master"] == master.doors["native"]
        assert following["incarnation"] > 0
        first = following["seq"]
        client.report("a:dp0", [b"-1", b"2"], Tier.DRAM, CALL)
        client.revoke("a:dp0", [b"2"], Tier.DRAM, CALL)
        client.clear_tier("a:dp0", Tier.DRAM, CALL)
        changes = watch.events("reported", "revoked", "cleared")
        assert [each["seq"] for each in changes] == [first + 1, first + 2, first + 3]
        assert [each["hashes"] for each in changes] == [["-1", "2"], ["2"], []]
        assert {(each["node"], each["tier"]) for each in changes} == {("a:dp0", "DRAM")}
        assert changes[2]["reason"]
        assert watch.process.wait(DEADLINE) == 0
    client.close()


@pytest.mark.parametrize(
    ("filters", "seen"),
    [
        (("--node", "a:dp1"), [("a:dp1", "HBM"), ("a:dp1", "DRAM"), ("a:dp1", "SSD")]),
        (("--node", "a:*", "--tier", "ssd"), [("a:dp0", "SSD"), ("a:dp1", "SSD")]),
        (("--node", "[::1]:9", "--node", "*:dp0", "--tier", "HBM"), [("a:dp0", "HBM"), ("[::1]:9", "HBM")]),
        (("--tier", "HBM", "--tier", "SSD", "--node", "[::1]:9"), [("[::1]:9", "HBM"), ("[::1]:9", "SSD")]),
    ],
)
def test_filters(tmp_path: Path, master: MasterProcess, filters: tuple[str, ...], seen: list[tuple[str, str]]) -> None:
    client = master.native()
    with watching(tmp_path, master, "--json", "--changes", str(2 * len(seen)), *filters) as watch:
        watch.events("connected", "following")
        for tier in (Tier.HBM, Tier.DRAM, Tier.SSD):
            for node in ("a:dp0", "a:dp1", "[::1]:9"):
                client.report(node, [b"x"], tier, CALL)
                client.clear_tier(node, tier, CALL)
        found = [(told["node"], told["tier"], told["event"]) for told in (watch.told() for _ in range(2 * len(seen)))]
        assert watch.process.wait(DEADLINE) == 0
    client.close()
    assert found == [(*where, event) for where in seen for event in ("reported", "cleared")]


def test_lines_for_people(tmp_path: Path, master: MasterProcess) -> None:
    client = master.native()
    with watching(tmp_path, master, "--hashes", "2", "--changes", "4") as watch:
        assert watch.line().endswith(f"connected to the master at {master.doors['native']}")
        assert watch.line().endswith(" follow")
        client.report("a:dp0", [b"%d" % number for number in range(1200)], Tier.SSD, CALL)
        assert watch.line()[9:] == "+ SSD  a:dp0 1,200: 0 1 and 1,198 more"
        client.revoke("a:dp0", [b"7", b"1"], Tier.SSD, CALL)
        assert watch.line()[9:] == "- SSD  a:dp0 2: 7 1"
        client.revoke("a:dp0", [b"8"], Tier.SSD, CALL)
        assert watch.line()[9:] == "- SSD  a:dp0 1: 8"
        client.clear_tier("a:dp0", Tier.SSD, CALL)
        assert watch.line()[9:].startswith("x SSD  a:dp0 everything")
        assert watch.process.wait(DEADLINE) == 0
    client.close()


def test_a_restarted_master_is_waited_for_and_said(tmp_path: Path) -> None:
    with MasterProcess(tmp_path, "--state-dir=none") as first:
        door = first.doors["native"]
        with watching(tmp_path, first, "--json") as watch:
            _, following = watch.events("connected", "following")
            assert first.end() == 0
            (away,) = watch.events("away")
            assert away["reason"] == "the master stops"
            with MasterProcess(tmp_path, f"--native-listen={door}", "--state-dir=none") as second:
                _, restarted = watch.events("connected", "restarted")
                assert restarted["incarnation"] != following["incarnation"]
                client = second.native()
                client.register(Registration("n"), CALL)
                client.report("n", [b"1"], Tier.HBM, CALL)
                client.close()
                (change,) = watch.events("reported")
                assert change["hashes"] == ["1"]
                assert second.end() == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--master", "grpc://127.0.0.1:1"), "give the umbp:// address"),
        (("--master", "umbp://127.0.0.1:1"), "127.0.0.1:1"),
        (("--tier", "L2"), "--tier 'L2' is not known; give one of UNKNOWN, HBM, DRAM, SSD"),
    ],
)
def test_what_does_not_work_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UMBP, "watch", "--timeout", "1", *arguments],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("umbp: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
