"""The SSD tier as the leader sees it: the folder's lock and the catalogue that follows the directory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from umbp_connectors.pool.catalogue import Catalogue
from umbp_connectors.pool.catalogue_schema import CatalogueRow
from umbp_connectors.pool.durability import Durability
from umbp_connectors.pool.folder import NamespaceFolder
from umbp_connectors.pool.refit import follow_moves
from umbp_core.directory import Change, Directory, EventKind
from umbp_core.errors import StateError, TierUnavailable
from umbp_core.tiers import Tier

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0


class SsdCatalogue:
    """What lies in which SSD slot, over restarts.  Scheduler thread; the disk is written by a thread of its own."""

    def __init__(self, folder: NamespaceFolder, catalogue: Catalogue, rows: Sequence[CatalogueRow], slots: int) -> None:
        self._folder = folder
        self._catalogue = catalogue
        self._rows: Sequence[CatalogueRow] = rows
        self._closed = False
        self.slots = slots

    def restore(self, directory: Directory) -> int:
        """Publish in ``directory`` what an earlier life left; returns how many objects.

        Rows that do not fit are forgotten, never a reason not to start (law L9).
        """
        bad = []
        for row in self._rows:
            try:
                directory.restore(row.key, Tier.SSD, (row.slot,), row.nbytes, row.checksums, row.depth)
            except StateError:
                bad.append(row.key)
        if bad:
            logger.warning("umbp: %d of %d catalogue rows do not fit and are forgotten", len(bad), len(self._rows))
            self._catalogue.forget(bad)
        restored = len(self._rows) - len(bad)
        self._rows = ()
        directory.drain_events()
        return restored

    def follow(self, changes: Iterable[Change]) -> None:
        """Write down what changed on SSD; does not wait."""
        for change in changes:
            if change.tier is not Tier.SSD:
                continue
            if change.kind is EventKind.ADDED:
                self._catalogue.record(
                    [
                        CatalogueRow(key, copy.pages[0], copy.nbytes, copy.checksum, copy.depth)
                        for key, copy in zip(change.keys, change.copies, strict=True)
                    ]
                )
            else:
                self._catalogue.forget(change.keys)

    def close(self) -> None:
        """Write what is pending and give the folder free; idempotent, bounded in time."""
        if not self._closed:
            self._closed = True
            self._catalogue.close(CLOSE_TIMEOUT_S)
            self._folder.close()


def open_ssd_catalogue(
    ssd_dir: Path,
    namespace: str,
    *,
    layouts: Sequence[bytes],
    slots: int,
    slot_bytes: Sequence[int],
    durability: Durability = "batched",
    prefixes: Sequence[bytes] = (),
    writers: Sequence[int] = (),
    fitted: bool = False,
) -> SsdCatalogue | None:
    """Lock the namespace's folder and open its catalogue; ``None``, with one sentence, when that cannot be.

    ``layouts`` and ``slot_bytes`` are the ranks' in world-rank order: a catalogue belongs to all of them together.  For
    tools it says what the ranks' object keys begin with (``prefixes``) and whose slab each uses (``writers``).  With
    ``fitted`` every slab has been fitted to just so many ``slots``, and what lay beyond them was moved.
    """
    about = {
        "layouts": b"".join(layouts),
        "prefixes": b"".join(prefixes),
        "writers": b",".join(b"%d" % rank for rank in writers),
    }
    identity = hashlib.sha256(b"".join(layouts)).digest()
    folder = NamespaceFolder(ssd_dir, namespace)
    try:
        folder.open()
        catalogue = folder.catalogue(identity, identity, len(layouts), slots, max(slot_bytes), durability, about)
        if fitted:
            follow_moves(catalogue.path, slots)
        rows = catalogue.open()
    except TierUnavailable as error:
        folder.close()
        logger.warning("umbp: the SSD tier is off: %s", error)
        return None
    return SsdCatalogue(folder, catalogue, rows, slots)
