"""The memory of a pool as another process would map it."""

from __future__ import annotations

import mmap

import numpy as np

from umbp_connectors.pool.buffers import Bytes
from umbp_connectors.pool.local import LocalPool


def memory_of(pool: LocalPool) -> Bytes:
    """The pages of ``pool``, shape (pages, bytes of a page)."""
    offer = pool.arena_offer()
    mapping = mmap.mmap(offer.fd, offer.pages * offer.page_bytes)
    return np.frombuffer(mapping, np.uint8).reshape(offer.pages, offer.page_bytes)
