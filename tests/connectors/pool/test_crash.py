"""Writers that are killed at random points, in all durability modes, beside a model of what was acknowledged.

``make crash`` kills a thousand in each mode; here it is some dozens.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.connectors.pool import crash_writer
from tests.connectors.pool.crash_writer import CAPACITY, KEYS, SIZE, Order, open_pool, version_in
from umbp_connectors.pool.durability import Durability
from umbp_connectors.pool.local import GetStatus
from umbp_core.tiers import Tier

KILLS = int(os.environ.get("CRASH_KILLS", "25"))
SEED = int(os.environ.get("CRASH_SEED", "1"))
MODES: tuple[Durability, ...] = ("strict", "batched", "relaxed")


@dataclass
class Model:
    """What writers said.

    ``safe`` are the objects that were acknowledged to be on SSD and have not left it since, ``floor`` is the oldest
    version of each that may come back, ``newest`` the latest that anybody began to write.
    """

    strict: bool
    safe: dict[int, int] = field(default_factory=dict)
    floor: dict[int, int] = field(default_factory=dict)
    newest: int = 0
    _stored: dict[int, int] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)

    def hear(self, words: list[str]) -> None:
        numbers = [int(word) for word in words[1:]]
        if words[0] == "begin":
            self.newest, self._begun = numbers[0], set(numbers[1:])
        elif words[0] == "put":
            version, keys = numbers[0], numbers[1:]
            self._begun.clear()
            self._stored.update(dict.fromkeys(keys, version))
            if self.strict:
                self.safe.update(dict.fromkeys(keys, version))
        elif words[0] == "gone":
            for key in numbers:
                self.safe.pop(key, None)
        elif words[0] == "flushed":
            held = set(numbers)
            self.safe = {key: self._stored[key] for key in held if key in self._stored}
            self.floor = {key: self._stored.get(key, 0) if key in held else self.newest + 1 for key in range(len(KEYS))}

    def restarted(self, found: dict[int, int]) -> None:
        """What a restart found is what counts from now on."""
        self._stored = dict(found)
        self.safe = dict(found)
        self._begun.clear()


class Crasher:
    """Kills writers and looks at what they leave."""

    def __init__(self, folder: Path, durability: Durability, seed: int) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        command = [sys.executable, crash_writer.__file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.folder = folder
        self.durability = durability
        self.chance = random.Random(seed)
        self.model = Model(durability == "strict")
        self.kept = 0
        """Acknowledged objects that restarts had to have, and had."""

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def kill_one(self) -> None:
        """Let a writer work for a while and die, by our hand or in the middle of a write."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        fuse = self.chance.randint(1, 60) if self.chance.random() < 0.4 else 0
        order = Order(str(self.folder), self.durability, self.chance.getrandbits(40), self.model.newest + 1, fuse)
        stdin.write(order.line())
        stdin.flush()
        pid, lines = 0, self.chance.randint(1, 120)
        for line in stdout:
            words = line.decode().split()
            if words[0] == "dead":
                return
            if words[0] == "pid":
                pid = int(words[1])
            else:
                self.model.hear(words)
            lines -= 1
            if lines <= 0 and pid:
                with contextlib.suppress(ProcessLookupError):  # it died of its fuse, and its last words are read now
                    os.kill(pid, signal.SIGKILL)
                lines = 1 << 30
        pytest.fail("the process that makes writers is gone")

    def look(self, sound: bool = True) -> None:
        """Restart, and compare with the model; after damage (not ``sound``) nothing has to be there."""
        with closing(open_pool(self.folder, self.durability)) as pool:
            assert pool.stats(Tier.SSD) is not None, "L9: a restart never refuses"
            claimed = pool.exists(KEYS)
            found: dict[int, int] = {}
            for index, key in enumerate(KEYS):
                buffer = bytearray(SIZE)
                (status,) = pool.get([key], [buffer])
                if status.hit:
                    version = version_in(key, bytes(buffer))
                    assert claimed[index]
                    assert version is not None, "L1: wrong bytes"
                    assert self.model.floor.get(index, 0) <= version <= self.model.newest or not sound
                    found[index] = version
                else:
                    assert status in (GetStatus.MISS, GetStatus.CORRUPT)
            if sound:
                lost = {key: version for key, version in self.model.safe.items() if found.get(key) != version}
                assert lost == {}, "what was acknowledged is not there"
                self.kept += len(self.model.safe)
            assert pool.flush(60)
        self.model.restarted(found)
        used = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        assert used <= CAPACITY + 4096, "L8: locks and identity.json are the rest"


@pytest.fixture
def crasher(tmp_path: Path) -> Iterator[Callable[[Durability, int], Crasher]]:
    made: list[Crasher] = []

    def make(durability: Durability, seed: int) -> Crasher:
        made.append(Crasher(tmp_path, durability, seed))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("durability", MODES)
def test_what_was_acknowledged_survives_every_kill(
    crasher: Callable[[Durability, int], Crasher], durability: Durability
) -> None:
    writers = crasher(durability, SEED)
    for _ in range(KILLS):
        writers.kill_one()
        writers.look()
    assert writers.kept > KILLS, "hardly anything was acknowledged, so nothing was tried"


def _flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 30)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _tear(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def _fill(path: Path, chance: random.Random) -> None:
    """A stretch of zeros, as a file system may leave one behind."""
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.randint(1, 3 * SIZE))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["slab-*.bin", "catalogue-*.sqlite", "catalogue-*.sqlite-wal"])
def test_damage_after_a_kill_costs_hits_only(crasher: Callable[[Durability, int], Crasher], kind: str) -> None:
    writers = crasher("batched", SEED)
    damaged = 0
    for _ in range(max(6, KILLS // 4)):
        writers.kill_one()
        for path in writers.folder.rglob(kind):
            if path.stat().st_size:
                writers.chance.choice([_flip, _tear, _fill])(path, writers.chance)
                damaged += 1
        writers.look(sound=False)
    assert damaged > 3, "there was nothing to damage"
