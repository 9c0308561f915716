"""Where block hashes differ from process to process, the start says what to set, and nothing outlives the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from umbp_core.tiers import Tier


@pytest.mark.parametrize("seed", [None, "0"], ids=["random", "fixed"])
def test_sharing_is_off_until_the_start_of_the_hashes_is_fixed(
    make_umbp: MakeUmbp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seed: str | None,
) -> None:
    if seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    tiers = {"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB", "log_level": "warning"}
    engine = make_umbp(tiers, hash_algo="xxhash")
    engine.store(tokens(24))
    said = [record.getMessage() for record in caplog.records if record.name.startswith(("umbp", "vllm.umbp"))]
    name = engine.add(tokens(26), max_tokens=1)
    engine.drain()
    assert engine.external_tokens(name) == 24, "within the process it serves as ever"
    on_ssd = engine.pool.directory.keys(Tier.SSD) if seed else []
    engine.close()
    if seed is None:
        advice, off = said
        assert "PYTHONHASHSEED" in advice
        assert "SSD tier is off" in off
        assert list(tmp_path.rglob("catalogue-*")) == []
    else:
        assert said == []
        assert len(on_ssd) == 6


def test_the_hosts_daemon_is_spared_what_nobody_could_ask_it_for(
    make_umbp: MakeUmbp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    door = tmp_path / "run" / "daemon.sock"
    mode = {"mode": "daemon", "daemon_socket": str(door), "daemon_auto_start": True, "log_level": "warning"}
    engine = make_umbp(mode, hash_algo="xxhash")
    engine.store(tokens(24))
    name = engine.add(tokens(26), max_tokens=1)
    engine.drain()
    assert engine.external_tokens(name) == 24, "out of a pool of its own"
    assert not door.exists()
    assert "sharing (mode daemon)" in caplog.text
