"""What the makers of tiers and clients return, as Protocols; the built-in ones are in ``umbp_connectors.pool``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class DramTier(Protocol):
    """Pages of shared memory by number.  Views may be used by any thread."""

    page_bytes: int
    pages: int
    staging_pages: int

    def open(self) -> None:
        """Get the memory.  Raises ``TierUnavailable`` or ``ConfigError`` when it cannot be had."""
        ...

    def close(self) -> None:
        """Give the memory back; idempotent."""
        ...

    def page(self, index: int, nbytes: int | None = None) -> memoryview:
        """The first ``nbytes`` of page ``index`` (all of it by default), writable, no copy."""
        ...


class SsdTier(Protocol):
    """Slots of a file by number.  Any thread; the GIL is released while bytes move."""

    slot_bytes: int
    slots: int

    def open(self, read_only: bool = False) -> None:
        """Get the space.  Raises ``TierUnavailable`` when it cannot be had."""
        ...

    def read_into(self, slot: int, view: memoryview, /) -> None:
        """Fill ``view`` from the start of ``slot``.  Raises an ``UmbpError``."""
        ...

    def write_from(self, slot: int, view: memoryview, /) -> None:
        """Write ``view`` to the start of ``slot``.  Raises an ``UmbpError``."""
        ...

    def sync(self) -> None:
        """Return when everything written before is durable."""
        ...

    def close(self) -> None:
        """Close the file; idempotent."""
        ...


class PoolClient(Protocol):
    """Put, get and exists for batches of objects given as buffers."""

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of ``keys`` can be had now."""
        ...

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...
