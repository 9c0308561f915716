"""Loads from SSD that fail, and the failure policy: engines with settings of their own, one per test."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm.engine.faults import break_scatter, stored
from tests.vllm.engine.local import BLOCK, Ask, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt
from umbp_core.tiers import Tier

BLOCKS = 6


def test_a_disk_that_hangs_is_given_up_at_the_deadline(
    llama: Path, oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, other = Ask(prompt(BLOCKS * BLOCK + 5, seed=400)), Ask(prompt(BLOCKS * BLOCK + 5, seed=401))
    right = [reply.tokens for reply in oracle.ask(llama, hung, other)]
    with engine(llama, kv_transfer_config=pool(tmp_path)) as first:
        first.ask(hung, other)
    released = threading.Event()
    with engine(llama, kv_transfer_config=pool(tmp_path, load_timeout_s=0.5)) as second:
        for name in ("read_into", "read_run"):
            monkeypatch.setattr(second.slab, name, _hang(getattr(second.slab, name), released))
        begin = time.monotonic()
        reply = second.ask_one(hung)
        seconds = time.monotonic() - begin
        released.set()
        monkeypatch.undo()
        second.forget()
        loads = second.leader.pool.loads
        loads._policy = dataclasses.replace(loads._policy, timeout_s=60.0)
        healthy = second.ask_one(other)
    assert [reply.tokens, healthy.tokens] == right
    assert seconds < 60, "the request waited for the disk instead of its deadline"
    assert healthy.cached == BLOCKS * BLOCK, "the pool does not serve after a load that hung"


@pytest.mark.parametrize("index", [0, BLOCKS - 1])
def test_a_block_whose_bytes_changed_on_ssd(llama: Path, oracle: Oracle, tmp_path: Path, index: int) -> None:
    ask = Ask(prompt(BLOCKS * BLOCK + 5, seed=500 + index))
    (right,) = oracle.ask(llama, ask)
    with engine(llama, kv_transfer_config=pool(tmp_path)) as first:
        first.ask_one(ask)
        first.drain()
        slot = first.pages_of(ask, Tier.SSD)[index]
    _flip_slot(tmp_path, slot)
    with engine(llama, kv_transfer_config=pool(tmp_path)) as second:
        reply = second.ask_one(ask)
        second.forget()
        again = second.ask_one(ask)
        failed = second.metric("vllm:umbp_failed_blocks", direction="load")
    assert reply.tokens == again.tokens == right.tokens
    assert again.cached == BLOCKS * BLOCK
    assert failed == 1


def test_the_user_may_prefer_an_error(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(llama, kv_transfer_config=pool(load_failure_policy="fail")) as strict:
        ask = stored(strict, BLOCKS, seed=600)
        break_scatter(monkeypatch, strict, strict.pages_of(ask)[0])
        failed = strict.ask_one(ask)
        monkeypatch.undo()
        healthy = strict.ask_one(Ask(prompt(50, seed=601)))
    assert failed.finish_reason == "error"
    assert healthy.finish_reason == "length"


def _hang(read: Callable[..., None], released: threading.Event) -> Callable[..., None]:
    def hang(*arguments: object) -> None:
        released.wait(120)
        read(*arguments)

    return hang


def _flip_slot(ssd_dir: Path, slot: int) -> None:
    (slab,) = ssd_dir.rglob("slab-*.bin")
    slot_bytes = BLOCK * 2048
    with slab.open("r+b") as file:
        file.seek(slot * slot_bytes + 77)
        byte = file.read(1)
        file.seek(slot * slot_bytes + 77)
        file.write(bytes([byte[0] ^ 1]))
