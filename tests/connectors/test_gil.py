"""While bytes move, other Python threads run: copies and checksums let go of the GIL."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.connectors.gil import Bystander
from umbp_connectors.pool import checksums
from umbp_connectors.pool.buffers import Pieces
from umbp_connectors.pool.checksums import copy_checksummed, object_checksum

KEY = b"key"
NBYTES = 32 << 20


@pytest.fixture
def bystander() -> Iterator[Bystander]:
    with Bystander().watching() as bystander:
        yield bystander


class NoHasher:
    """Takes no time, so that what remains is the copy."""

    def update(self, data: object) -> None:
        pass

    def digest(self) -> bytes:
        return b""


def test_somebody_who_keeps_the_gil_would_be_noticed(bystander: Bystander) -> None:
    assert not bystander.runs_during(lambda: sum(range(20_000)))


def test_while_a_checksum_is_taken(bystander: Bystander) -> None:
    data = np.ones(NBYTES, np.uint8)
    assert bystander.runs_during(lambda: object_checksum(KEY, data))


@pytest.mark.parametrize("in_pieces", [False, True])
def test_while_an_object_is_copied(bystander: Bystander, monkeypatch: pytest.MonkeyPatch, in_pieces: bool) -> None:
    monkeypatch.setattr(checksums, "xxh3_128", lambda key: NoHasher())
    target = np.zeros(NBYTES, np.uint8)
    whole = np.ones((2, NBYTES // 2 + 64), np.uint8)
    source = Pieces([whole[:, :-64]]) if in_pieces else np.ones(NBYTES, np.uint8)
    assert bystander.runs_during(lambda: copy_checksummed(KEY, target, source))
    assert target.all()
