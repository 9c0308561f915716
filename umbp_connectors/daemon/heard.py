"""What a pool of the daemon holds by what one who follows it has heard."""

from __future__ import annotations

from collections.abc import Iterable

from umbp_connectors.daemon.news import Changed, Listed, News
from umbp_core.directory import Change, EventKind
from umbp_core.holdings import Holdings
from umbp_core.tiers import Tier

_TIERS = (Tier.DRAM, Tier.SSD)
_DAEMON = "daemon"


class HeardPool:
    """Makes changes of news.  What is said although it is so already is no change.  One thread at a time."""

    def __init__(self) -> None:
        self._held = Holdings()
        self._listing: dict[Tier, list[bytes]] = {}

    def take(self, news: News) -> list[Change]:
        """What ``news`` change, in order."""
        if isinstance(news, Changed):
            return self._turned(news)
        return self._listed(news)

    def lose(self) -> list[Change]:
        """Nothing is known any more, so nothing is there; what that changes."""
        self._listing = {}
        return _changes((EventKind.REMOVED, tier, self._held.clear(_DAEMON, tier)) for tier in _TIERS)

    def holdings(self) -> list[tuple[Tier, list[bytes]]]:
        """All that is there, tier by tier."""
        return [(tier, self._held.held(tier)) for tier in _TIERS]

    def _turned(self, news: Changed) -> list[Change]:
        held = self._held
        return _changes(
            (EventKind.ADDED, turn.tier, held.add(_DAEMON, turn.tier, turn.keys))
            if turn.came
            else (EventKind.REMOVED, turn.tier, held.remove(_DAEMON, turn.tier, turn.keys))
            for turn in news.turns
        )

    def _listed(self, news: Listed) -> list[Change]:
        self._listing.setdefault(news.tier, []).extend(news.keys)
        if not news.last:
            return []
        listing, self._listing = self._listing, {}
        turned = [(tier, *self._held.replace(_DAEMON, tier, listing.get(tier, ()))) for tier in _TIERS]
        return [
            change
            for tier, came, left in turned
            for change in _changes(((EventKind.REMOVED, tier, left), (EventKind.ADDED, tier, came)))
        ]


def _changes(turned: Iterable[tuple[EventKind, Tier, list[bytes]]]) -> list[Change]:
    return [Change(kind, tier, keys, ()) for kind, tier, keys in turned if keys]
