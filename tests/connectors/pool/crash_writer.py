"""A process that makes writers, each a fork of it, that use a pool until they are killed.

``python crash_writer.py`` reads orders (JSON, one a line) and answers with lines of its own: those of the writer, and
``dead`` when it has ended.  Forking from a process without threads makes a writer in milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from umbp_connectors.pool.books import Contents
from umbp_connectors.pool.durability import Durability
from umbp_connectors.pool.local import LocalPool, LocalPoolConfig, PutStatus
from umbp_core.directory import Change, EventKind
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SIZE = 8192
PAGES = 10
SLOTS = 24
KEYS = [b"key %02d" % number for number in range(40)]
CAPACITY = (1 << 20) + SLOTS * (SIZE + 768)


@dataclass(frozen=True)
class Order:
    """What a writer is to do.  ``fuse``: it kills itself in the middle of that write to the slab; 0: never."""

    folder: str
    durability: Durability
    seed: int
    version: int
    fuse: int

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def open_pool(
    folder: Path, durability: Durability, follower: Follower | None = None, demote_threads: int = 1
) -> LocalPool:
    config = LocalPoolConfig(
        SIZE,
        PAGES * SIZE,
        folder,
        CAPACITY,
        prefault=False,
        patience_s=0,
        durability=durability,
        copy_threads=1,
        demote_threads=demote_threads,
    )
    pool = LocalPool(Identity("model", b"\x11" * 32, RankScope()), config)
    if follower is not None:
        pool.observe(follower)
    pool.open()
    return pool


def object_of(key: bytes, version: int) -> bytes:
    """The bytes of one version of an object; every eight of them name it."""
    return (b"%s%09d;" % (key[-2:], version) * SIZE)[:SIZE]


def version_in(key: bytes, data: bytes) -> int | None:
    """Which version of ``key`` these bytes are; ``None`` when they are none."""
    text = data[2:11]
    version = int(text) if text.isdigit() else -1
    return version if version >= 0 and data == object_of(key, version) else None


def say(*words: object) -> None:
    """One line to whoever gave the order; lines are never torn."""
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


class Follower:
    """Says which objects leave the SSD."""

    def changed(self, changes: Sequence[Change], contents: Contents) -> None:
        del contents
        for change in changes:
            if change.tier is Tier.SSD and change.kind is EventKind.REMOVED:
                say("gone", *(KEYS.index(key) for key in change.keys))


def write(order: Order) -> None:
    """Put, get, clear and flush at random until killed."""
    chance = random.Random(order.seed)
    if order.fuse:
        _light(order.fuse)
    # One thread writes several objects together, several of them one each.
    pool = open_pool(Path(order.folder), order.durability, Follower(), chance.choice((1, 4)))
    version = order.version
    while True:
        number = chance.randint(1, 4)
        chosen = chance.sample(range(len(KEYS)), number)
        keys = [KEYS[index] for index in chosen]
        if chance.random() < 0.25:
            pool.get(keys, [bytearray(SIZE) for _ in keys])
            continue
        if chance.random() < 0.04:
            pool.clear()
        say("begin", version, *chosen)
        statuses = pool.put(keys, [object_of(key, version) for key in keys])
        stored = [index for index, status in zip(chosen, statuses, strict=True) if status is PutStatus.STORED]
        say("put", version, *stored)
        version += 1
        if chance.random() < 0.2 and pool.flush(60):
            say("flushed", *(KEYS.index(key) for key in pool.holdings()[Tier.SSD]))


def _light(fuse: int) -> None:
    """Die in the middle of the write to a slab that many writes from now."""
    real, left = os.pwritev, [fuse]

    def burning(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        left[0] -= 1
        if left[0] == 0:
            real(fd, [*views[:-1], views[-1][:4096]], offset, flags)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(fd, views, offset, flags)

    os.pwritev = burning


def serve() -> None:
    """One writer after the other."""
    np.zeros(1)
    for line in sys.stdin.buffer:
        order = Order(**json.loads(line))
        pid = os.fork()
        if pid == 0:
            write(order)
        say("pid", pid)
        os.waitpid(pid, 0)
        say("dead")


if __name__ == "__main__":
    serve()
