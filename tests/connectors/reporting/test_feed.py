"""A feed: order, bound, and what a producer that cannot list what it holds costs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pytest

from umbp_connectors.reporting.feed import Feed


class Producer:
    """Counts how often its truth is asked for, and can fail to give it."""

    def __init__(self, max_waiting: int = 4) -> None:
        self.bell = threading.Event()
        self.asked = 0
        self.broken = False
        self.feed: Feed[str] = Feed("pool", lambda item: (), self._truth, self.bell, max_waiting)

    def _truth(self) -> str:
        self.asked += 1
        if self.broken:
            raise RuntimeError("no list today")
        return f"truth {self.asked}"

    def take(self) -> Sequence[str]:
        taken = self.feed.take()
        assert not taken.lost
        return taken.items


def test_items_come_out_in_order_and_once() -> None:
    producer = Producer()
    for item in ("a", "b", "c"):
        producer.feed.tell(1, item)
    assert producer.bell.is_set()
    assert producer.feed.waiting == 3
    assert producer.take() == ["a", "b", "c"]
    assert producer.take() == []
    assert producer.feed.waiting == 0


def test_items_of_no_weight_are_told_too() -> None:
    producer = Producer(max_waiting=0)
    producer.feed.tell(0, "cleared")
    assert producer.take() == ["cleared"]
    assert producer.asked == 0


def test_more_than_may_wait_is_replaced_by_the_whole_truth() -> None:
    producer = Producer(max_waiting=4)
    for item in ("a", "b", "c", "d"):
        producer.feed.tell(1, item)
    assert producer.asked == 0
    producer.feed.tell(1, "e")
    producer.feed.tell(2, "f")
    assert producer.take() == ["truth 1", "f"]
    counters = producer.feed.counters
    assert (counters.told, counters.overflows, counters.resyncs) == (6, 1, 1)


def test_one_item_that_is_too_heavy_by_itself_is_replaced_too() -> None:
    producer = Producer(max_waiting=4)
    producer.feed.tell(5, "all of it")
    assert producer.take() == ["truth 1"]


def test_the_whole_truth_can_be_told_at_any_time() -> None:
    producer = Producer()
    producer.feed.tell(1, "a")
    producer.feed.tell_all()
    producer.feed.tell(1, "b")
    assert producer.take() == ["truth 1", "b"]
    assert producer.feed.counters.overflows == 0


def test_on_demand_the_next_thing_told_is_the_whole_truth() -> None:
    producer = Producer()
    producer.feed.demand()
    assert producer.take() == []
    producer.feed.tell(1, "a")
    producer.feed.tell(1, "b")
    assert producer.take() == ["truth 1", "b"]


def test_a_truth_that_cannot_be_had_is_asked_for_on_demand_only(caplog: pytest.LogCaptureFixture) -> None:
    producer = Producer(max_waiting=1)
    producer.broken = True
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            producer.feed.tell(1, "a")
    assert producer.asked == 1
    assert "what pool holds cannot be listed" in caplog.text
    taken = producer.feed.take()
    assert (taken.items, taken.lost) == ([], True)
    assert not producer.feed.take().lost, "is said once"
    producer.feed.demand()
    caplog.clear()
    producer.feed.tell(1, "b")
    assert (producer.asked, producer.feed.counters.failures, caplog.text) == (2, 2, "")
    producer.broken = False
    producer.feed.demand()
    producer.feed.tell(1, "c")
    taken = producer.feed.take()
    assert (taken.items, taken.lost) == (["truth 3"], True)


def test_a_muted_feed_drops_what_it_is_told() -> None:
    producer = Producer()
    producer.feed.tell(1, "a")
    producer.feed.mute()
    producer.feed.tell(1, "b")
    assert (producer.take(), producer.feed.waiting, producer.asked) == ([], 0, 0)


@pytest.mark.parametrize("what", ["tell", "tell_all", "demand", "mute"])
def test_nothing_is_taken_after_close(what: str) -> None:
    producer = Producer()
    producer.feed.tell(1, "a")
    producer.feed.close()
    calls = {
        "tell": lambda: producer.feed.tell(9, "b"),
        "tell_all": producer.feed.tell_all,
        "demand": producer.feed.demand,
        "mute": producer.feed.mute,
    }
    calls[what]()
    producer.feed.tell(1, "c")
    assert producer.take() == []
    assert producer.feed.waiting == 0


def test_the_bell_rings_for_whatever_came_after_the_last_look() -> None:
    producer = Producer(max_waiting=1000)
    seen = 0

    def tell() -> None:
        for _ in range(500):
            producer.feed.tell(1, "x")

    thread = threading.Thread(target=tell)
    thread.start()
    while seen < 500:
        assert producer.bell.wait(60.0), "something was told and nobody rang"
        producer.bell.clear()
        seen += len(producer.take())
    thread.join(60.0)
    assert (seen, producer.feed.counters.told) == (500, 500)
