"""Pages of a pool that somebody writes in place before it knows under which keys; objects of several parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.connectors.pool_memory import memory_of
from umbp_connectors.pool.books import Filled
from umbp_connectors.pool.checksums import object_checksum
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_connectors.pool.stripes import Stripes, group_identity
from umbp_core.errors import StateError
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SIZE = 4096
PAGES = 6
ALONE = (Identity("stock", b"\x11" * 32, RankScope()),)
RANKS = tuple(replace(ALONE[0], rank=RankScope(tp_rank=rank, tp_size=3)) for rank in range(3))
BOTH = pytest.mark.parametrize("identities", [ALONE, RANKS], ids=["alone", "ranks"])


class Writer:
    """A pool whose memory is mapped once more, as another process would have it."""

    def __init__(self, identities: tuple[Identity, ...], folder: Path | None = None) -> None:
        self.stripes = Stripes(tuple(identity.digest for identity in identities), SIZE)
        prefixes = self.stripes.prefixes if len(identities) > 1 else ()
        ssd = {"ssd_dir": folder, "ssd_capacity": 8 << 20, "patience_s": 0} if folder is not None else {}
        whole = len(identities) * SIZE
        config = LocalPoolConfig(whole, PAGES * whole, prefault=False, prefixes=prefixes, **ssd)  # type: ignore[arg-type]
        self.pool = LocalPool(group_identity(identities), config)
        self.pool.open()
        self.pages = memory_of(self.pool)

    def write(self, page: int, number: int, nbytes: int = SIZE) -> Filled:
        """Object ``number``, in that page."""
        whole = self.stripes.whole(nbytes)
        self.pages[page, :whole] = number
        key = b"key %d" % number
        sums = b"".join(object_checksum(prefix + key, bytes([number]) * nbytes) for prefix in self.stripes.prefixes)
        return Filled(page, key, whole, number, sums)

    def read(self, *numbers: int) -> list[GetStatus]:
        """Where these are; what is lent has to be what was written."""
        loan = self.pool.lend([b"key %d" % number for number in numbers], 10)
        for number, lent in zip(numbers, loan.objects, strict=True):
            assert not lent.status.hit or np.all(self.pages[lent.page, : lent.nbytes] == number)
        loan.release()
        return [lent.status for lent in loan.objects]

    @property
    def held(self) -> int:
        """Pages that are taken for somebody."""
        stats = self.pool.stats(Tier.DRAM)
        assert stats is not None
        return stats.reserved + stats.pinned


Make = Callable[..., Writer]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Writer] = []

    def make(*arguments: object) -> Writer:
        made.append(Writer(*arguments))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.pool.close()


@BOTH
def test_what_is_published_can_be_read(make: Make, identities: tuple[Identity, ...]) -> None:
    writer = make(identities)
    stock = writer.pool.stock()
    pages = stock.take(3)
    assert (stock.pages, writer.held, stock.take(0)) == (frozenset(pages), 3, [])
    filled = [writer.write(page, number, 100) for number, page in enumerate(pages[:2])]
    assert writer.read(0, 1) == [GetStatus.MISS] * 2
    assert stock.publish(filled) == [PutStatus.STORED] * 2
    assert writer.read(0, 1, 2) == [GetStatus.DRAM, GetStatus.DRAM, GetStatus.MISS]
    assert stock.publish([writer.write(pages[2], 1)]) == [PutStatus.PRESENT]
    assert stock.publish([writer.write(pages[2], 2)]) == [PutStatus.STORED]
    assert writer.held == len(stock.pages) == 0
    counted = writer.pool.counters().puts
    assert (counted[PutStatus.STORED], counted[PutStatus.PRESENT]) == (3, 1)


def test_there_are_as_many_pages_as_can_be_had(make: Make) -> None:
    writer = make(ALONE)
    writer.pool.put([b"key 9"], [bytes([9]) * SIZE])
    loan = writer.pool.lend([b"key 9"])
    one, two = writer.pool.stock(), writer.pool.stock()
    assert len(one.take(4)) == 4
    assert len(two.take(4)) == 1, "one is lent"
    assert writer.pool.put([b"other"], [bytes(SIZE)]) == [PutStatus.NO_ROOM]
    loan.release()
    assert len(two.take(4)) == 1
    assert writer.read(9) == [GetStatus.MISS], "it made room"
    assert one.close() == 4
    assert one.close() == 0
    assert writer.held == 2
    assert len(two.take(9)) == 4


@BOTH
def test_what_cannot_be_published(make: Make, identities: tuple[Identity, ...]) -> None:
    writer = make(identities)
    stock, other = writer.pool.stock(), writer.pool.stock()
    (page,), (theirs,) = stock.take(1), other.take(1)
    good = writer.write(page, 1)
    assert stock.publish([good._replace(nbytes=0)]) == [PutStatus.TOO_LARGE]
    assert stock.publish([good._replace(nbytes=len(identities) * SIZE + 1)]) == [PutStatus.TOO_LARGE]
    for wrong in ([good._replace(page=theirs)], [good, good], [good, good._replace(page=99)]):
        with pytest.raises(StateError):
            stock.publish(wrong)
    for pages in ([theirs], [page, 99]):
        with pytest.raises(StateError, match="not in the stock"):
            stock.give_back(pages)
    assert writer.held == 2
    stock.give_back([page])
    with pytest.raises(StateError):
        stock.publish([good])
    stock.close()
    for call in (lambda: stock.take(1), lambda: stock.publish([]), lambda: stock.give_back([])):
        with pytest.raises(StateError, match="closed"):
            call()
    assert writer.held == 1


def test_a_page_from_before_a_clear_is_refused_once(make: Make) -> None:
    writer = make(ALONE)
    stock = writer.pool.stock()
    old, older = stock.take(2)
    writer.pool.clear()
    (new,) = stock.take(1)
    filled = [writer.write(page, number) for number, page in enumerate((old, new))]
    assert stock.publish(filled) == [PutStatus.NO_ROOM, PutStatus.STORED]
    assert stock.publish([filled[0], writer.write(older, 2)]) == [PutStatus.STORED, PutStatus.NO_ROOM]
    assert writer.read(0, 1, 2) == [GetStatus.DRAM, GetStatus.DRAM, GetStatus.MISS]


@BOTH
def test_a_pool_that_closes_publishes_nothing(make: Make, identities: tuple[Identity, ...]) -> None:
    writer = make(identities)
    stock = writer.pool.stock()
    (page,) = stock.take(1)
    filled = writer.write(page, 1)
    writer.pool.close()
    assert stock.publish([filled]) == [PutStatus.NO_ROOM]
    assert stock.close() == 1
    with pytest.raises(StateError):
        writer.pool.stock()


@BOTH
def test_it_goes_to_ssd_and_comes_back_verified(make: Make, tmp_path: Path, identities: tuple[Identity, ...]) -> None:
    first = make(identities, tmp_path)
    stock = first.pool.stock()
    for number in range(2 * PAGES):
        (page,) = stock.take(1)
        assert stock.publish([first.write(page, number, SIZE - 5)]) == [PutStatus.STORED]
        assert first.pool.flush(60)
    assert first.read(0, 2 * PAGES - 1) == [GetStatus.SSD, GetStatus.DRAM]
    first.pool.close()
    second = make(identities, tmp_path)
    assert second.pool.counters().restored == 2 * PAGES
    assert second.read(1, 3, 5) == [GetStatus.SSD] * 3
    (page,) = second.pool.stock().take(1)
    slab = next(tmp_path.glob("*/rank0/slab-*.bin"))
    with slab.open("r+b") as file:
        whole = bytearray(file.read())
        at = whole.index(bytes([7]) * SIZE) if len(identities) > 1 else whole.index(bytes([7]) * (SIZE - 5))
        file.seek(at + (len(identities) - 1) * SIZE + 17)
        file.write(b"?")
    assert second.read(7, 8) == [GetStatus.CORRUPT, GetStatus.SSD], "the last part of one was changed"


def test_bytes_that_changed_in_memory_are_forgotten(make: Make) -> None:
    writer = make(RANKS)
    stock = writer.pool.stock()
    pages = stock.take(3)
    stock.publish([writer.write(page, number) for number, page in enumerate(pages)])
    for number, page in enumerate(pages):
        writer.pages[page, number * SIZE + 5] ^= 1
    assert writer.pool.check([b"key %d" % number for number in range(4)]) == 3
    assert writer.read(0, 1, 2) == [GetStatus.MISS] * 3


def test_objects_of_several_parts_are_not_put_or_fetched_whole(make: Make) -> None:
    pool = make(RANKS).pool
    for call in (
        lambda: pool.put([b"a"], [bytes(8)]),
        lambda: pool.stage([b"a"], [bytes(8)]),
        lambda: pool.get([b"a"], [bytearray(8)]),
        lambda: pool.grant([b"a"], [8]),
    ):
        with pytest.raises(StateError, match="several ranks"):
            call()


def test_how_a_page_is_divided() -> None:
    stripes = Stripes((b"a" * 32, b"b" * 32), SIZE)
    assert (stripes.count, stripes.whole(10), stripes.part(SIZE + 10)) == (2, SIZE + 10, 10)
    data = np.arange(SIZE + 10, dtype=np.uint8)
    expected = object_checksum(b"a" * 32 + b"k", data[:10]) + object_checksum(b"b" * 32 + b"k", data[SIZE:])
    assert stripes.checksum(b"k", data) == expected
    assert group_identity(ALONE) is ALONE[0]
    assert (
        len({group_identity(RANKS).digest, group_identity(RANKS[::-1]).digest, group_identity(RANKS[:2]).digest}) == 3
    )
