"""What the makers of tiers and clients return, as Protocols; the built-in ones are in ``umbp_connectors.pool``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class DramTier(Protocol):
    """Pages of shared memory by number, open.  Views may be used by any thread."""

    page_bytes: int
    pages: int
    staging_pages: int

    @property
    def array(self) -> Any:
        """All pages as a numpy array of uint8, shape (pages + staging_pages, page_bytes), writable, no copy."""
        ...

    def page(self, index: int, nbytes: int | None = None) -> memoryview:
        """The first ``nbytes`` of page ``index`` (all of it by default), writable, no copy."""
        ...

    def close(self) -> None:
        """Give the memory back; idempotent."""
        ...


class Slots(Protocol):
    """Slots of a file by number.  Any thread; the GIL is released while bytes move."""

    slot_bytes: int
    slots: int

    def read_into(self, slot: int, view: Any, /) -> None:
        """Fill the buffer ``view`` from the start of ``slot``.  Raises an ``UmbpError``."""
        ...

    def write_from(self, slot: int, view: Any, /) -> None:
        """Write the buffer ``view`` to the start of ``slot``.  Raises an ``UmbpError``."""
        ...

    def sync(self) -> None:
        """Return when everything written before is durable."""
        ...


class SsdTier(Protocol):
    """One rank's share of the SSD tier, open and locked against a second owner."""

    @property
    def slab(self) -> Slots:
        """The slots."""
        ...

    @property
    def slots(self) -> int:
        """How many objects fit."""
        ...

    def close(self) -> None:
        """Close the file and let the folder go; idempotent."""
        ...


class PoolClient(Protocol):
    """Put, get and exists for batches of objects given as buffers, open.  Any thread."""

    def put(self, keys: Sequence[bytes], buffers: Sequence[Any], depths: Sequence[int] | None = None) -> Sequence[Any]:
        """Store ``buffers[i]`` under block key ``keys[i]``; the answers say how each went."""
        ...

    def get(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> Sequence[Any]:
        """Fill ``buffers[i]`` with the object under ``keys[i]``; the answers say how each went."""
        ...

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of ``keys`` can be read now."""
        ...

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...
