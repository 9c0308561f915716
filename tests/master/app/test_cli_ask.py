"""``umbp nodes``, ``match``, ``hits`` and ``top`` against a real master, for people and for programs."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.master.app.master_process import CALL, DEADLINE, UMBP, MasterProcess, environment
from umbp_connectors import cli
from umbp_connectors.cli_views import size_text
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import Heartbeat, Registration, TierCapacity
from umbp_core.tiers import Tier

GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def master(folder: Path) -> Iterator[MasterProcess]:
    with MasterProcess(folder, UMBP_HEARTBEAT_TTL_SEC="3600") as running:
        client = running.native()
        capacities = (TierCapacity(Tier.DRAM, 4 * GIB, 3 * GIB), TierCapacity(Tier.HBM, GIB, 0))
        client.register(Registration("n1", "h1", "10.0.0.1:17000", b"", capacities, ("sgl_role=decode",)), CALL)
        client.register(Registration("n2"), CALL)
        client.report("n1", [b"-1", b"2", b"3"], Tier.HBM, CALL)
        client.report("n1", [b"-1", b"2", b"3", b"4"], Tier.DRAM, CALL)
        client.report("n2", [b"-1"], Tier.SSD, CALL)
        client.heartbeat(Heartbeat("n1", [Bundle(1, (Delta(b"k", Tier.DRAM, 9),))], full_sync=True, baseline=1), CALL)
        client.close()
        yield running
        assert running.end() == 0


@pytest.fixture(params=["native", "grpc", "both"])
def address(request: pytest.FixtureRequest, master: MasterProcess) -> str:
    native, grpc = f"umbp://{master.doors['native']}", f"grpc://{master.doors['grpc']}"
    return {"native": native, "grpc": grpc, "both": f"{grpc},{native}"}[request.param]


@pytest.fixture(scope="module")
def native(master: MasterProcess) -> str:
    return f"umbp://{master.doors['native']}"


def in_process(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``umbp``, run here: a process of its own takes a second."""
    out, err = io.StringIO(), io.StringIO()
    environ = {"COLUMNS": "200", "NO_COLOR": "1"} | variables
    with (
        mock.patch.dict(os.environ, environ),
        mock.patch.object(sys, "argv", ["umbp", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        cli.main()
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def asked(*arguments: str, **variables: str) -> str:
    command, *rest = arguments
    code, out, err = in_process(command, "--timeout", str(CALL), *rest, **variables)
    assert (code, err) == (0, "")
    return out


def answer(command: str, *arguments: str) -> Any:
    return json.loads(asked(command, "--json", *arguments))


def test_nodes_for_programs(native: str) -> None:
    first, second = sorted(answer("nodes", "--master", native), key=lambda node: node["node"])
    assert first.pop("last_heartbeat_age_s") >= 0
    assert first == {
        "node": "n1",
        "status": "alive",
        "peer_address": "10.0.0.1:17000",
        "node_address": "h1",
        "tags": ["sgl_role=decode"],
        "incarnation": 0,
        "capacities": {"HBM": {"total": GIB, "available": 0}, "DRAM": {"total": 4 * GIB, "available": 3 * GIB}},
        "blocks": {"DRAM": 1},
        "external": {"HBM": 3, "DRAM": 4},
    }
    assert (second["node"], second["external"]) == ("n2", {"SSD": 1})


def test_nodes_for_people(native: str) -> None:
    shown = asked("nodes", UMBP_MASTER_ADDRESS=native)
    for text in ("n1", "alive", "10.0.0.1:17000", "1.0 GiB of 4.0 GiB", "HBM 3", "DRAM 4", "sgl_role=decode", "n2"):
        assert text in shown


def test_match_for_programs(address: str) -> None:
    found = answer("match", "--master", address, "--", "3", "-1", "nobody")
    assert sorted(found, key=lambda node: node["node"]) == [
        {
            "node": "n1",
            "peer_address": "10.0.0.1:17000",
            "matched": 2,
            "tiers": {"HBM": ["3", "-1"], "DRAM": ["3", "-1"]},
        },
        {"node": "n2", "peer_address": "", "matched": 1, "tiers": {"SSD": ["-1"]}},
    ]
    assert answer("match", "--master", address, "nobody") == []


def test_match_for_people(address: str) -> None:
    shown = asked("match", "--master", address, "2", "nobody")
    assert "1 of 2" in shown
    assert "HBM 1" in shown
    assert "no node holds any of them" in asked("match", "--master", address, "nobody")


def test_prefix(address: str) -> None:
    found = answer("match", "--master", address, "--prefix", "--", "-1", "2", "4", "nobody")
    assert found == [
        {"node": "n1", "length": 3, "runs": [{"tier": "HBM", "blocks": 2}, {"tier": "DRAM", "blocks": 1}], "cost": 0.0},
        {"node": "n2", "length": 1, "runs": [{"tier": "SSD", "blocks": 1}], "cost": 0.0},
    ]
    shown = asked("match", "--master", address, "--prefix", "--", "-1", "2", "4", "nobody")
    assert "3 of 4" in shown
    assert "2 HBM, 1 DRAM" in shown


def test_explain(native: str) -> None:
    (found,) = answer("match", "--master", native, "--explain", "n1", "4")
    assert (found["node"], found["status"], found["tiers"]) == ("n1", "alive", ["DRAM"])
    assert found["text"] in asked("match", "--master", native, "--explain", "n1", "4")


def test_hits_are_those_that_were_asked_to_count(address: str) -> None:
    before = {each["hash"]: each["hits"] for each in answer("hits", "--master", address, "4", "nobody")}
    answer("match", "--master", address, "--count", "4", "nobody")
    after = {each["hash"]: each["hits"] for each in answer("hits", "--master", address, "4", "nobody")}
    assert after == {"4": before.get("4", 0) + 1}
    assert "4" in asked("hits", "--master", address, "4")
    assert "no hash of these has a counter" in asked("hits", "--master", address, "nobody")


def test_hits_without_hashes_are_the_most_matched_ones_that_nodes_hold(tmp_path: Path) -> None:
    with MasterProcess(tmp_path) as master:
        address = f"umbp://{master.doors['native']}"
        assert answer("hits", "--master", address) == []
        client = master.native()
        keys = [b"%04d" % number for number in range(3000)]
        for node, tier in (("n1", Tier.HBM), ("n1", Tier.SSD), ("n2", Tier.DRAM)):
            if tier is not Tier.SSD:
                client.register(Registration(node), CALL)
            client.report(node, keys, tier, CALL)
        client.match(keys, True, CALL)
        client.match([b"2999", b"0007"], True, CALL)
        client.match([b"2999"], True, CALL)
        client.close()
        found = answer("hits", "--master", address, "--top", "3")
        assert found == [{"hash": "2999", "hits": 3}, {"hash": "0007", "hits": 2}, {"hash": "0000", "hits": 1}]
        assert len(answer("hits", "--master", address, "--top", "5000", "--scan", "1500")) == 1500
        assert "2999" in asked("hits", "--master", address)
        assert master.end() == 0


def test_hashes_come_from_standard_input(folder: Path, native: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UMBP, "match", "--master", native, "--json", "-"],
        env=environment(folder),
        input="2\n3\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    assert json.loads(done.stdout)[0]["matched"] == 2


def test_top_shows_as_many_looks_as_asked_for(native: str) -> None:
    lines = asked("top", "--master", native, "--looks", "2", "--interval", "0.1", "--json").splitlines()
    assert len(lines) == 2
    for line in lines:
        told = json.loads(line)
        assert told["error"] == ""
        assert {node["node"]: node["change_per_s"] for node in told["nodes"]} == {"n1": 0.0, "n2": 0.0}
    shown = asked("top", "--master", native, "--looks", "1", "--interval", "0.1")
    assert "2 of 2 nodes alive, 1 blocks, 8 external" in shown
    assert "change/s" in shown


def test_top_waits_for_a_master_that_went_away(tmp_path: Path) -> None:
    with MasterProcess(tmp_path) as master:
        watcher = subprocess.Popen(
            [
                *(sys.executable, "-c", UMBP, "top", "--json", "--interval", "0.1", "--looks", "100000"),
                *("--timeout", str(CALL), "--master", f"umbp://{master.doors['native']}"),
            ],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline())["error"] == ""
        assert master.end() == 0
        errors = (json.loads(line)["error"] for line in watcher.stdout)
        assert next(error for error in errors if error)
        watcher.kill()
        watcher.wait(DEADLINE)
        watcher.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nodes", "--master", "umbp://127.0.0.1:1"], "127.0.0.1:1"),
        (["nodes", "--master", "127.0.0.1:1"], "no master answers: "),
        (["match", "a", "--master", "http://x"], "unknown scheme 'http'"),
        (["match", "a", "--master", "umbp://127.0.0.1:1", "--tls-cert", "x"], "come together"),
        (["nodes", "--master", "umbp://127.0.0.1:1", "--token-file", "missing"], "missing cannot be read"),
    ],
)
def test_what_does_not_work_is_one_sentence_and_exit_code_2(arguments: list[str], sentence: str) -> None:
    code, out, err = in_process(*arguments, "--timeout", "1")
    assert (code, out) == (2, "")
    assert err.startswith("umbp: ")
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [["nodes"], ["top"], ["match", "a", "--explain", "n1"]])
def test_what_the_old_wire_cannot_say_is_a_sentence(folder: Path, master: MasterProcess, command: list[str]) -> None:
    code, out, err = in_process(*command, "--master", f"grpc://{master.doors['grpc']}")
    assert (code, out) == (2, "")
    assert "give the umbp:// address" in err


def test_token_is_sent(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cret\n", encoding="ascii")
    secret.chmod(0o600)
    with MasterProcess(tmp_path, "--token-file", str(secret)) as master:
        for address in (f"umbp://{master.doors['native']}", f"grpc://{master.doors['grpc']}"):
            assert asked("match", "a", "--json", "--master", address, "--token-file", str(secret)) == "[]\n"
            assert asked("match", "a", "--json", "--master", address, UMBP_MASTER_TOKEN="s3cret") == "[]\n"
            code, _, err = in_process("match", "a", "--master", address)
            assert code == 2
            assert "token" in err
        assert master.end() == 0


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * GIB // 2, "1.5 GiB"), (1 << 60, "1024.0 PiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text
