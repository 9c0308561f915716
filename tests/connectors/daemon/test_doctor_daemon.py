"""``umbp doctor`` on the host's daemon: whether it is there, lets us in, and can be mapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.connectors.daemon.conftest import Daemon
from umbp_connectors.config import resolve
from umbp_connectors.daemon import overview
from umbp_connectors.doctor import daemon as module
from umbp_connectors.doctor.findings import Finding, Status

TOKEN = "for-the-doctor"


def look(**keys: object) -> Finding:
    (finding,) = module.reached(resolve({"mode": "daemon", **keys}, {}).config)
    return finding


def test_who_wants_no_daemon_hears_nothing_of_it() -> None:
    assert list(module.reached(resolve({}, {}).config)) == []


def test_over_both_doors(start: Callable[..., Daemon], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 60.0)
    missing = look(daemon_socket=str(path))
    assert (missing.status, "start `umbp daemon`" in missing.advice) == (Status.WARNING, True)
    assert look(daemon_socket=str(path), daemon_auto_start=True).status is Status.OK
    daemon = start(daemon_listen="127.0.0.1:0", daemon_token=TOKEN)
    assert look(daemon_socket=str(path)).found == f"0 pool(s) at {path}"
    at = {"daemon_address": str(daemon.server.endpoint)}
    assert look(**at, daemon_token=TOKEN).found == f"0 pool(s) at tcp://{daemon.server.endpoint}"
    wrong = look(**at, daemon_token="another")
    assert (wrong.status, "the token is wrong" in wrong.found) == (Status.PROBLEM, True)
    none = look(**at)
    assert (none.status, "needs a token" in none.found) == (Status.PROBLEM, True)
    monkeypatch.setattr(overview.os, "getpid", lambda: 1 << 30)  # as of a process that this one does not see
    unseen = look(**at, daemon_token=TOKEN)
    assert (unseen.status, "--pid=host" in unseen.advice) == (Status.PROBLEM, True)
