"""What becomes of the changes of a directory: rows of the catalogue, and one piece of news instead of many."""

from __future__ import annotations

from collections.abc import Sequence

from umbp_connectors.pool.catalogue import Catalogue
from umbp_connectors.pool.catalogue_schema import MOST, CatalogueRow
from umbp_core.directory import Change, EventKind
from umbp_core.tiers import Tier


def record(catalogue: Catalogue, changes: Sequence[Change]) -> None:
    """Write down what came to SSD and what left it, in order.

    A depth that no row can have, as one below 0 for an unknown one, is written as the nearest that it can.
    """
    for change in changes:
        if change.tier is not Tier.SSD:
            continue
        for kind, key, _, pages, nbytes, checksum, depth in change.events():
            if kind is EventKind.ADDED:
                catalogue.record([CatalogueRow(key, pages[0], nbytes, checksum, min(max(0, depth), MOST))])
            else:
                catalogue.forget([key])


def together(added: Sequence[Change]) -> Change:
    """The same additions to one tier as one."""
    keys = [key for change in added for key in change.keys]
    copies = [copy for change in added for copy in change.copies]
    return Change(EventKind.ADDED, added[0].tier, keys, copies)
