"""The table of bounds: how large anything may be that crosses a socket (law L10).

A frame's bound is checked when its header is read, before there is memory for the rest; that of a list before the list
is made.  ``docs/protocol.md`` has the same table, and a test compares the two.
"""

from __future__ import annotations

from typing import Final

MIB: Final = 1 << 20

HEADER_BYTES: Final = 40
"""Every frame begins with this many bytes."""
HELLO_BYTES: Final = 16 << 10
"""Payload of a frame of a connection that has not been greeted yet."""
FRAME_BYTES: Final = 16 * MIB
"""Payload of a frame, unless the two sides were configured otherwise ..."""
FRAME_BYTES_CEILING: Final = 64 * MIB
"""... which they may be up to here."""
HASHES: Final = 1 << 20
"""Hashes or keys of one packed list."""
KEYS: Final = 1 << 14
"""Keys of a request that is answered in one go: routes, lookups, hit counts."""
HASH_BYTES: Final = (1 << 16) - 1
"""One hash or key."""
STRING_CHARS: Final = 1024
"""A name or an address, in characters."""
TOKEN_BYTES: Final = 4096
"""The shared token."""
TEXT_CHARS: Final = 4096
"""An error's message, a reason, the help of a metric."""
ENGINE_DESC_BYTES: Final = 1 * MIB
"""A node's description of its engine."""
SMALL_LIST: Final = 256
"""Tags or capacities of a node, labels of a sample, tiers of a map of weights or counts."""
SAMPLES: Final = 1 << 13
"""Metrics of one report."""
LIST: Final = 1 << 16
"""Any other list: bundles, actions, nodes, changes, excluded nodes."""
PAGE_HASHES: Final = 1 << 16
"""Hashes of one page of a listing."""

TABLE: Final = {
    "HEADER_BYTES": HEADER_BYTES,
    "HELLO_BYTES": HELLO_BYTES,
    "FRAME_BYTES": FRAME_BYTES,
    "FRAME_BYTES_CEILING": FRAME_BYTES_CEILING,
    "HASHES": HASHES,
    "KEYS": KEYS,
    "HASH_BYTES": HASH_BYTES,
    "STRING_CHARS": STRING_CHARS,
    "TOKEN_BYTES": TOKEN_BYTES,
    "TEXT_CHARS": TEXT_CHARS,
    "ENGINE_DESC_BYTES": ENGINE_DESC_BYTES,
    "SMALL_LIST": SMALL_LIST,
    "SAMPLES": SAMPLES,
    "LIST": LIST,
    "PAGE_HASHES": PAGE_HASHES,
}
"""All of them by name."""
