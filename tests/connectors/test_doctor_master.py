"""``umbp doctor`` on the master: whether it is configured, answers, and lets us in."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.master.app.master_process import MasterProcess
from umbp_connectors.config import resolve
from umbp_connectors.doctor import master as module
from umbp_connectors.doctor.findings import Finding, Status
from umbp_connectors.doctor.master import answers

CERTS = Path(__file__).resolve().parents[1] / "master" / "certs"
TOKEN = "one-that-nobody-guesses"
LONG_S = 60.0


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MasterProcess]:
    with MasterProcess(tmp_path_factory.mktemp("master"), UMBP_MASTER_TOKEN=TOKEN) as running:
        yield running


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A master that is there is waited for."""
    monkeypatch.setattr(module, "TIMEOUT_S", LONG_S)


@pytest.fixture
def nobody() -> Iterator[str]:
    """The address of somebody who takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"umbp://127.0.0.1:{server.getsockname()[1]}"


def findings(**keys: object) -> list[Finding]:
    return list(answers(resolve(keys, {}).config))


def test_without_a_master_there_is_a_note() -> None:
    assert [(finding.status, finding.found) for finding in findings()] == [(Status.NOTE, "none")]


@pytest.mark.parametrize(
    ("door", "words"),
    [("umbp://{native}", "ms (native protocol), 0 living node(s)"), ("grpc://{grpc}", "ms (UMBP's gRPC)")],
)
def test_a_master_that_answers(master: MasterProcess, door: str, words: str) -> None:
    (finding,) = findings(master_address=door.format(**master.doors), master_token=TOKEN)
    assert finding.status is Status.OK
    assert finding.found.startswith(door.format(**master.doors))
    assert words in finding.found


@pytest.mark.parametrize("door", ["umbp://{native}", "grpc://{grpc}"])
def test_a_master_that_does_not_let_us_in(master: MasterProcess, door: str) -> None:
    (finding,) = findings(master_address=door.format(**master.doors), master_token="wrong")
    assert finding.status is Status.PROBLEM
    assert "token" in finding.found
    assert finding.advice.startswith("give master_token_file the master's token")


def test_the_token_may_stand_in_a_file(master: MasterProcess, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN, encoding="utf-8")
    path.chmod(0o600)
    address = f"umbp://{master.doors['native']}"
    (finding,) = findings(master_address=address, master_token_file=str(path))
    assert finding.status is Status.OK
    (finding,) = findings(master_address=address, master_token_file=str(tmp_path / "none"))
    assert (finding.status, "cannot be read" in finding.found) == (Status.PROBLEM, True)


def test_an_address_that_does_not_answer_is_named_and_the_next_is_asked(
    master: MasterProcess, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)
    (alone,) = findings(master_address=nobody)
    assert alone.status is Status.PROBLEM
    assert f"{nobody} does not answer" in alone.found
    monkeypatch.setattr(module, "TIMEOUT_S", LONG_S)
    closed = "umbp://127.0.0.1:1"
    first, second = findings(master_address=f"{closed},umbp://{master.doors['native']}", master_token=TOKEN)
    assert (first.status, second.status) == (Status.WARNING, Status.OK)
    assert f"{closed} does not answer" in first.found


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({}, "look whether `umbp master` is running there; "),
        ({"master_tls_ca": "/no/such/file.pem"}, "correct master_tls_ca, "),
        ({"master_tls_ca": str(CERTS / "stranger.pem")}, "look whether the master has TLS, "),
    ],
)
def test_the_advice_is_for_the_cause(tmp_path: Path, keys: dict[str, str], advice: str) -> None:
    files = [f"--{name}={CERTS / file}" for name, file in (("tls-cert", "server.pem"), ("tls-key", "server.key"))]
    with MasterProcess(tmp_path, *files) as running:
        port = running.doors["native"].rpartition(":")[2]
        (finding,) = findings(master_address=f"umbp://localhost:{port if keys else 1}", **keys)
    assert (finding.status, finding.advice[: len(advice)]) == (Status.PROBLEM, advice)
    assert finding.advice.endswith("; the engine works on, and reports later")


def test_reports_that_are_off_are_named(master: MasterProcess) -> None:
    note, finding = findings(master_address=f"umbp://{master.doors['native']}", master_token=TOKEN, report=False)
    assert (note.topic, note.status, finding.status) == ("reports", Status.NOTE, Status.OK)
