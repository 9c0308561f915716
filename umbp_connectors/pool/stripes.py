"""Objects of which several ranks have a part each: side by side in one page, every part with its own checksum."""

from __future__ import annotations

from dataclasses import dataclass

from umbp_connectors.pool.buffers import Bytes
from umbp_connectors.pool.checksums import object_checksum
from umbp_core.ids import Identity, RankScope, digest_of


@dataclass(frozen=True, slots=True)
class Stripes:
    """How a page is cut: part ``n`` begins at ``n * nbytes_each``, and all parts of an object are equally long.

    ``prefixes[n]`` is the digest of the identity that part ``n`` has, the first part of its object key.  With one
    stripe an object is what it is without any.
    """

    prefixes: tuple[bytes, ...]
    nbytes_each: int

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.prefixes)

    def whole(self, nbytes: int) -> int:
        """From the first byte of an object to its last, when each part has ``nbytes``."""
        return (self.count - 1) * self.nbytes_each + nbytes

    def part(self, whole: int) -> int:
        """The other way round; below 1 for what no such object has."""
        return whole - (self.count - 1) * self.nbytes_each

    def checksum(self, key: bytes, data: Bytes) -> bytes:
        """The checksums of all parts of ``key`` one after the other, given its bytes from the first to the last."""
        each, nbytes = self.nbytes_each, self.part(data.nbytes)
        return b"".join(
            object_checksum(prefix + key, data[number * each : number * each + nbytes])
            for number, prefix in enumerate(self.prefixes)
        )


def group_identity(identities: tuple[Identity, ...]) -> Identity:
    """The identity of objects whose parts have these.  That of a single part is its own."""
    if len(identities) == 1:
        return identities[0]
    return group_of(identities[0].namespace, tuple(identity.digest for identity in identities))


def group_of(namespace: str, prefixes: tuple[bytes, ...]) -> Identity:
    """The same, given the digests of several."""
    return Identity(namespace, digest_of({"stripes": [prefix.hex() for prefix in prefixes]}), RankScope())
