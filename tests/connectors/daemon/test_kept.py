"""Connections of one engine that end at the same moment, as they do when the engine ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest

from tests.connectors.daemon.kit import IDENTITY, PAGES, SIZE
from umbp_connectors.daemon.holdings import ClientHoldings
from umbp_connectors.daemon.kept import KeptPool
from umbp_connectors.daemon.messages import REVISION, Attach, scope_of
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.settings import LocalPoolConfig
from umbp_core.tiers import Tier

CLIENT = b"c" * 16
GREETING = Attach(
    REVISION, CLIENT, "shared", IDENTITY.layout, scope_of(IDENTITY), SIZE, PAGES * SIZE, 0, 1, 1.0, b"", "an engine"
)


@pytest.fixture
def kept() -> Iterator[KeptPool]:
    kept = KeptPool(LocalPool(IDENTITY, LocalPoolConfig(SIZE, PAGES * SIZE, prefault=False)), PAGES, SIZE)
    kept.open()
    yield kept
    kept.close()


def taken(kept: KeptPool) -> int:
    fill = kept.pool.stats(Tier.DRAM)
    assert fill is not None
    return fill.reserved


def lead(kept: KeptPool, life: bytes, pages: int) -> int:
    """A connection that speaks for this life of the engine, and takes so many pages."""
    number = kept.join(CLIENT, "a leader")
    holdings, turn, _ = kept.holdings(number, msgspec.structs.replace(GREETING, life=life, turn=1))
    assert len(holdings.take(turn, kept.take(CLIENT, pages))) == pages
    return number


def test_a_connection_that_is_leaving_keeps_nothing_of_an_engine(
    kept: KeptPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lead(kept, b"first", 2)
    rank = kept.join(CLIENT, "a rank")
    kept.leave(first)
    assert taken(kept) == 2, "the rank may still copy"
    second = lead(kept, b"second", 3)

    closing, go_on, close = threading.Event(), threading.Event(), ClientHoldings.close

    def slow(holdings: ClientHoldings) -> int:
        closing.set()
        assert go_on.wait(60)
        return close(holdings)

    with monkeypatch.context() as patch:
        patch.setattr(ClientHoldings, "close", slow)
        leaving = threading.Thread(target=kept.leave, args=(rank,))
        leaving.start()
        assert closing.wait(60)
        patch.setattr(ClientHoldings, "close", close)
        kept.leave(second)
        go_on.set()
        leaving.join(60)
    assert taken(kept) == 0
    assert kept.is_idle
    assert kept.take(CLIENT, PAGES) == PAGES // 2, "nothing counts as held"
