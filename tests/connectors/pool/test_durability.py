"""What is written is brought to the device in its time, and the thread that does it ends."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.connectors.gate import Gate
from umbp_connectors.pool import durability
from umbp_connectors.pool.durability import BATCH_S, SyncBehind
from umbp_connectors.pool.slab import SlabFile
from umbp_core.errors import StateError, TransferError

SLOT = 8192


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """One permit for each sync of a file."""
    done = threading.Semaphore(0)
    real = os.fdatasync

    def counted(fd: int) -> None:
        real(fd)
        done.release()

    monkeypatch.setattr(os, "fdatasync", counted)
    return done


def test_a_batched_slab_is_synced_soon_after_a_write(tmp_path: Path, syncs: threading.Semaphore) -> None:
    slab = SlabFile(tmp_path / "slab.bin", SLOT, 4, durability="batched")
    slab.open()
    slab.write_from(0, bytes(SLOT))
    assert syncs.acquire(timeout=60)
    slab.close()


def test_a_batched_slab_is_synced_once_a_second(
    tmp_path: Path, syncs: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Watched(threading.Condition):
        """Knows for how long somebody wanted to wait, and does not let him."""

        def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
            if timeout is None:
                return super().wait_for(predicate)
            waits.append(timeout)
            return predicate()

    monkeypatch.setattr(durability.threading, "Condition", Watched)
    slab = SlabFile(tmp_path / "slab.bin", SLOT, 4, durability="batched")
    monkeypatch.undo()
    slab.open()
    slab.write_from(0, bytes(SLOT))
    slab.close(timeout=30)
    assert waits[0] == BATCH_S == 1.0


def test_what_was_written_last_is_synced_by_closing(tmp_path: Path, syncs: threading.Semaphore) -> None:
    slab = SlabFile(tmp_path / "slab.bin", SLOT, 4, durability="batched")
    slab.open()
    slab.write_from(0, bytes(SLOT))
    slab.close(timeout=30)
    assert syncs.acquire(blocking=False)
    assert "umbp-sync-slab.bin" not in {thread.name for thread in threading.enumerate()}


def test_nobody_syncs_a_relaxed_slab_or_one_that_is_only_read(tmp_path: Path, syncs: threading.Semaphore) -> None:
    relaxed = SlabFile(tmp_path / "slab.bin", SLOT, 4)
    relaxed.open()
    relaxed.write_from(0, bytes(SLOT))
    relaxed.close()
    reader = SlabFile(tmp_path / "slab.bin", SLOT, 4, durability="batched")
    reader.open(read_only=True)
    assert "umbp-sync-slab.bin" not in {thread.name for thread in threading.enumerate()}
    reader.close()
    assert not syncs.acquire(blocking=False)


def test_a_write_during_a_sync_has_one_of_its_own() -> None:
    gate = Gate()
    behind = SyncBehind(gate, "test", interval_s=0.001)
    behind.start()
    behind.note()
    gate.wait_until_held()
    behind.note()
    gate.open()
    gate.wait_until_held()
    behind.close(30)
    assert behind.syncs == 2


def test_a_disk_that_cannot_sync_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tried = threading.Semaphore(0)

    def broken() -> None:
        tried.release()
        raise TransferError("the disk is ill")

    behind = SyncBehind(broken, "test", interval_s=0.001)
    behind.start()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            behind.note()
            assert tried.acquire(timeout=30)
        behind.close(30)
    assert caplog.text.count("the disk is ill") == 1


def test_a_slab_that_somebody_closed_ends_the_thread() -> None:
    tried = threading.Event()

    def closed() -> None:
        tried.set()
        raise StateError("not open")

    behind = SyncBehind(closed, "gone", interval_s=0.001)
    behind.start()
    behind.note()
    assert tried.wait(30)
    behind.close(30)
    assert "umbp-sync-gone" not in {thread.name for thread in threading.enumerate()}
