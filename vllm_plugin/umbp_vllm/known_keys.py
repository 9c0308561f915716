"""Which blocks a pool that others change is believed to hold: a hint, so that they are not stored once more."""

from __future__ import annotations

MOST = 1 << 18


class KnownKeys:
    """At most ``most`` keys; what was added longest ago is forgotten first.  One thread."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._keys: dict[bytes, None] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: bytes) -> None:
        """``key`` was there just now."""
        self._keys.pop(key, None)
        self._keys[key] = None
        if len(self._keys) > self._most:
            del self._keys[next(iter(self._keys))]

    def discard(self, key: bytes) -> None:
        """``key`` is not there."""
        self._keys.pop(key, None)

    def clear(self) -> None:
        """Nothing is there."""
        self._keys.clear()
