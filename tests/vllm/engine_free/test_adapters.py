"""LoRA adapters: what their files are belongs to the keys of their blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from tests.connectors.waiting import until
from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.fake_daemon import FakeDaemon
from tests.vllm.harness.host import HostHarness
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.tiers import Tier
from umbp_vllm import adapters
from umbp_vllm.matching import bare, block_hash_of
from umbp_vllm.published import HEX, INT64, GroupWords

PROMPT = tokens(24)
NAME = "poet"


@pytest.fixture
def poet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the adapter ``poet``."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lora" / NAME
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(b"one" * 1000)
    return folder


def disk(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"ssd_dir": str(tmp_path / "ssd"), "ssd_capacity": "4MiB", **more}


def external(engine: UmbpHarness, lora: str | None = NAME) -> int:
    """Ask for the prompt, have vLLM forget it, and tell how many of its tokens the pool gave."""
    request = engine.add(PROMPT, max_tokens=1, lora=lora)
    engine.drain()
    assert engine.reset_prefix_cache()
    return engine.external_tokens(request)


def loaded_as(engine: UmbpHarness, number: int, **more: Any) -> None:
    """vLLM gives adapters this number from now on."""
    engine._lora = lambda name: LoRARequest(name, number, f"lora/{name}", **more) if name else None  # type: ignore[method-assign]


def run(make_umbp: MakeUmbp, extra: dict[str, Any], lora: str | None = NAME) -> int:
    engine = make_umbp(extra)
    tokens = external(engine, lora)
    engine.close()
    return tokens


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"two" * 1000),
    "how they are applied": lambda folder: (folder / "adapter_config.json").write_text('{"r": 16}'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_another_adapter_at_the_same_path_does_not_get_the_old_ones_kv(
    make_umbp: MakeUmbp, poet: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    assert run(make_umbp, disk(tmp_path)) == 0
    assert run(make_umbp, disk(tmp_path)) == 24
    change(poet)
    assert run(make_umbp, disk(tmp_path)) == 0
    assert run(make_umbp, disk(tmp_path)) == 24


def test_requests_without_an_adapter_keep_their_keys(make_umbp: MakeUmbp, poet: Path) -> None:
    engine = make_umbp()
    assert external(engine, None) == 0
    assert all(engine.present(PROMPT, Tier.DRAM))
    assert [external(engine), external(engine), external(engine, None)] == [0, 24, 24]
    engine.close()


def test_an_adapter_whose_files_cannot_be_read_is_known_to_this_engine_only(
    make_umbp: MakeUmbp, poet: Path, tmp_path: Path
) -> None:
    (poet / "adapter_model.safetensors").unlink()
    engine = make_umbp(disk(tmp_path))
    assert [external(engine), external(engine)] == [0, 24]
    engine.close()
    assert run(make_umbp, disk(tmp_path)) == 0


def test_an_adapter_at_which_the_reader_breaks_is_known_to_this_engine_only(
    make_umbp: MakeUmbp, poet: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for a thread that has died."""

    def break_down(path: str) -> Any:
        raise RuntimeError(path)

    monkeypatch.setattr(adapters, "adapter_origin", break_down)
    engine = make_umbp({"lookup_timeout_ms": 60_000})
    assert [external(engine), external(engine)] == [0, 24]
    engine.close()
    assert f"what adapter {NAME} is cannot be found out" in caplog.text


def test_an_adapter_loaded_in_place_is_not_kept(make_umbp: MakeUmbp, poet: Path) -> None:
    """vLLM loads it again in every step that uses it; nobody knows what was there then."""
    engine = make_umbp()
    assert [external(engine), external(engine)] == [0, 24]
    loaded_as(engine, 7, load_inplace=True)
    stored = len(engine.idle_objects(Tier.DRAM))
    (poet / "adapter_model.safetensors").write_bytes(b"two" * 1000)
    assert [external(engine), external(engine)] == [0, 0]
    loaded_as(engine, 7)
    assert [external(engine), external(engine)] == [0, 0]
    assert len(engine.idle_objects(Tier.DRAM)) == stored
    assert [external(engine, None), external(engine, None)] == [0, 24]
    engine.close()


def test_an_adapter_loaded_again_is_looked_at_again(make_umbp: MakeUmbp, poet: Path) -> None:
    """With other weights it is not kept any more: vLLM finds the old KV in HBM by the same name and path."""
    engine = make_umbp()
    loaded_as(engine, 7)
    assert [external(engine), external(engine)] == [0, 24]
    loaded_as(engine, 8)
    assert external(engine) == 24
    (poet / "adapter_model.safetensors").write_bytes(b"two" * 1000)
    loaded_as(engine, 9)
    stored = len(engine.idle_objects(Tier.DRAM))
    assert [external(engine), external(engine)] == [0, 0]
    assert len(engine.idle_objects(Tier.DRAM)) == stored
    engine.close()


class SlowFiles:
    """Files that are read only when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_be_read = threading.Event()
        self._read = adapters._origin
        monkeypatch.setattr(adapters, "_origin", self._wait)

    def _wait(self, path: str) -> Any:
        assert self.may_be_read.wait(60)
        return self._read(path)


def test_a_request_waits_for_its_adapters_files_and_others_do_not(
    make_umbp: MakeUmbp, poet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_umbp, disk(tmp_path))
    run(make_umbp, disk(tmp_path), None)
    engine = make_umbp(disk(tmp_path, lookup_timeout_ms=60_000))
    files = SlowFiles(monkeypatch)
    waiting = engine.add(PROMPT, max_tokens=1, lora=NAME)
    other = engine.add(PROMPT, max_tokens=1)
    engine.step_until(lambda: other in engine.finish_reasons)
    assert engine.external_tokens(other) == 24
    assert engine.stat("lookup_waits", "adapter") > 0
    assert waiting not in engine.finish_reasons
    files.may_be_read.set()
    engine.drain()
    assert engine.external_tokens(waiting) == 24
    engine.close()


def test_files_that_take_too_long_are_a_miss_and_what_was_computed_meanwhile_is_stored_when_they_are_known(
    make_umbp: MakeUmbp, poet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_umbp({"lookup_timeout_ms": 1})
    files = SlowFiles(monkeypatch)
    request = engine.add(PROMPT, max_tokens=200, lora=NAME)
    engine.step_until(lambda: len(engine.tokens[request]) > 2)
    assert engine.external_tokens(request) == 0
    assert not engine.idle_objects(Tier.DRAM)
    files.may_be_read.set()
    until(lambda: not any(thread.name == "umbp-adapter" for thread in threading.enumerate()))
    engine.drain()
    assert engine.reset_prefix_cache()
    assert external(engine) == 24
    engine.close()


def test_over_the_daemon_too(poet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon()
    daemon.serve(monkeypatch)
    engine = HostHarness(daemon, {})
    engine.step_until(engine.is_attached)
    assert [external(engine), external(engine)] == [0, 24]
    engine.close()
    (poet / "adapter_model.safetensors").write_bytes(b"two" * 1000)
    engine = HostHarness(daemon, {})
    engine.step_until(engine.is_attached)
    assert [external(engine), external(engine)] == [0, 24]
    engine.close()


def test_others_are_told_the_engines_own_hashes(make_umbp: MakeUmbp, poet: Path) -> None:
    engine = make_umbp()
    external(engine)
    wanted = engine.keys(PROMPT, lora=engine._lora(NAME))[0]
    held = engine.idle_objects(Tier.DRAM)
    assert sorted(map(bare, held)) == sorted(wanted) != sorted(held)
    assert sorted(map(block_hash_of, held)) == sorted(map(block_hash_of, wanted)) == sorted(key[:-4] for key in wanted)
    groups = engine.leader.leader._groups  # type: ignore[attr-defined]
    for form in (HEX, INT64):
        told = [sorted(GroupWords(groups, form).replaced(Tier.DRAM, keys).hashes) for keys in (held, wanted)]
        assert told[0] == told[1]
    engine.close()
