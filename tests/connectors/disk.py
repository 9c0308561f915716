"""Disks that hang, fail or are full when a test says so."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from typing import Any

import pytest

from umbp_connectors.pool.catalogue_file import CatalogueFile


class Disk:
    """Stands between the slabs of this process and the file system: :meth:`hang`, :meth:`fail`, :meth:`work`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changed = threading.Condition()
        self._hanging: set[str] = set()
        self._failing: set[str] = set()
        self._held = 0
        self._number = errno.EIO
        self._left = {"read": 1 << 60, "write": 1 << 60, "sync": 1 << 60}
        self._real = {"read": os.preadv, "write": os.pwritev, "sync": os.fdatasync}
        monkeypatch.setattr(os, "preadv", lambda *arguments: self._do("read", *arguments))
        monkeypatch.setattr(os, "pwritev", lambda *arguments: self._do("write", *arguments))
        monkeypatch.setattr(os, "fdatasync", lambda *arguments: self._do("sync", *arguments))

    def __enter__(self) -> Disk:
        """For the length of a test; afterwards nothing hangs any more."""
        return self

    def __exit__(self, *_: object) -> None:
        self.work()
        self.wait_free()

    def hang(self, *kinds: str) -> None:
        """``read``, ``write`` and ``sync`` do not come back from now on."""
        with self._changed:
            self._hanging |= set(kinds)

    def fail(self, *kinds: str, number: int = errno.EIO) -> None:
        """These end with an error (of input/output) from now on, those that hang as well."""
        with self._changed:
            self._number = number
            self._failing |= set(kinds)
            self._hanging -= set(kinds)
            self._changed.notify_all()

    def work(self) -> None:
        """All is well again; what hung goes on."""
        with self._changed:
            self._hanging.clear()
            self._failing.clear()
            self._changed.notify_all()

    def fail_after(self, count: int, kind: str = "read") -> None:
        """So many more of this kind work, counting those that hang; the others fail."""
        with self._changed:
            self._left[kind] = count

    def wait_held(self, count: int) -> None:
        """Until so many transfers hang."""
        assert self.holds(count, 60)

    def holds(self, count: int, timeout: float) -> bool:
        """Whether so many transfers hang before ``timeout`` seconds are over."""
        with self._changed:
            return self._changed.wait_for(lambda: self._held >= count, timeout)

    def wait_free(self) -> None:
        """Until none hangs any more."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._held == 0, 60)

    def _do(self, kind: str, *arguments: Any) -> Any:
        with self._changed:
            self._held += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: kind not in self._hanging, 60), "a test forgot to let the disk go"
            self._held -= 1
            self._changed.notify_all()
            self._left[kind] -= 1
            failing = kind in self._failing or self._left[kind] < 0
        if failing:
            raise OSError(self._number, os.strerror(self._number))
        return self._real[kind](*arguments)


class FullDisk:
    """Takes no rows of a catalogue, while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = CatalogueFile._transact
        self.full = False
        monkeypatch.setattr(CatalogueFile, "_transact", lambda *args: self._transact(*args))

    def _transact(self, file: CatalogueFile, *work: Any) -> None:
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")
        self._real(file, *work)
