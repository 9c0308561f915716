"""What a transfer needs from the pool's memory and files, as Protocols.

:class:`~umbp_connectors.pool.arena.Arena` and :class:`~umbp_connectors.pool.slab.SlabFile` fit them.
"""

from __future__ import annotations

from typing import Protocol


class PageMemory(Protocol):
    """DRAM pages by number.  Any thread."""

    def page(self, index: int, nbytes: int | None = None) -> memoryview:
        """The first ``nbytes`` bytes of page ``index`` (all of them by default), writable, without a copy."""
        ...


class SlotStore(Protocol):
    """SSD slots by number.  Any thread; both calls release the GIL while bytes move."""

    def read_into(self, slot: int, buffer: memoryview, /) -> None:
        """Fill ``buffer`` from the start of ``slot``; raises an ``UmbpError`` or ``OSError`` when that fails."""
        ...

    def write_from(self, slot: int, buffer: memoryview, /) -> None:
        """Write ``buffer`` to the start of ``slot``; raises an ``UmbpError`` or ``OSError`` when that fails."""
        ...
