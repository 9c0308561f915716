"""Tables of nodes: a message names each node once, and refers to it by its place in the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from umbp_core.errors import ProtocolError
from umbp_core.wire import bounds
from umbp_core.wire.hashes import pack_hashes, unpack_hashes

_FEW = 64
"""Names of a table that is remembered: most answers name the same few nodes."""
_SHORT = 4096
"""Bytes of one that is remembered when it is read."""


def pack_names(names: tuple[str, ...]) -> bytes:
    """``names`` as a packed list in UTF-8."""
    return _packed(names) if len(names) <= _FEW else _pack(names)


def pack_table(nodes: tuple[str, ...], addresses: tuple[str, ...]) -> tuple[bytes, bytes]:
    """:func:`pack_names` of nodes and of their addresses."""
    return _packed_table(nodes, addresses) if len(nodes) <= _FEW else (_pack(nodes), _pack(addresses))


def unpack_names(blob: bytes) -> tuple[str, ...]:
    """The names in ``blob``.  Raises ``ProtocolError``."""
    return _unpacked(blob) if len(blob) <= _SHORT else _unpack(blob)


def read_table(nodes: bytes, addresses: bytes) -> Sequence[tuple[str, str]]:
    """Names with their addresses.  Raises ``ProtocolError`` when there are not as many of these."""
    return _known_table(nodes, addresses) if len(nodes) + len(addresses) <= _SHORT else _read_table(nodes, addresses)


def _read_table(nodes: bytes, addresses: bytes) -> tuple[tuple[str, str], ...]:
    names, places = unpack_names(nodes), unpack_names(addresses)
    if len(names) != len(places):
        raise ProtocolError(f"a table has {len(names)} nodes and {len(places)} addresses")
    return tuple(zip(names, places, strict=True))


def _pack(names: tuple[str, ...]) -> bytes:
    return pack_hashes([name.encode() for name in names])


def _unpack(blob: bytes) -> tuple[str, ...]:
    try:
        return tuple([name.decode() for name in unpack_hashes(blob, bounds.LIST)])
    except UnicodeDecodeError:
        raise ProtocolError("a table of nodes names one that is not UTF-8") from None


_packed = lru_cache(maxsize=256)(_pack)
_unpacked = lru_cache(maxsize=256)(_unpack)
_packed_table = lru_cache(maxsize=256)(lambda nodes, addresses: (_pack(nodes), _pack(addresses)))
_known_table = lru_cache(maxsize=256)(_read_table)


class NodeTable:
    """The nodes of one answer while it is being written: references count from 1, in the order of first mention."""

    __slots__ = ("_addresses", "_refs")

    def __init__(self) -> None:
        self._refs: dict[str, int] = {}
        self._addresses: list[str] = []

    def ref(self, node_id: str, address: str) -> int:
        """The reference to ``node_id``."""
        ref = self._refs.get(node_id)
        if ref is None:
            ref = self._refs[node_id] = len(self._refs) + 1
            self._addresses.append(address)
        return ref

    @property
    def nodes(self) -> bytes:
        """The packed names."""
        return pack_names(tuple(self._refs))

    @property
    def addresses(self) -> bytes:
        """The packed addresses, in the same order."""
        return pack_names(tuple(self._addresses))


def check_refs(refs: Iterable[int], table: Sequence[object]) -> None:
    """Raises ``ProtocolError`` when one of ``refs``, which count from 1, is not in ``table``."""
    if max(refs, default=0) > len(table):
        raise ProtocolError(f"an answer refers to a node that is not among the {len(table)} of its table")
