"""How much one master gives to the clients of its native door."""

from __future__ import annotations

from dataclasses import dataclass

from umbp_core.wire import bounds


@dataclass(frozen=True, slots=True)
class NativeLimits:
    """Bounds of the native door; times in seconds."""

    max_frame: int = bounds.FRAME_BYTES
    """Bytes of payload of a request."""
    max_hashes: int = bounds.HASHES
    """Hashes or keys that one request may name."""
    connections: int = 1024
    """Above this, a newcomer is told so and let go."""
    write_buffer: int = 1 << 20
    """While a client leaves more than this unread, nothing more is done for it."""
    turn: float = 0.002
    """How long one connection works before it lets the others in."""
    hello_timeout: float = 5.0
    """A connection that has not greeted by then is closed."""
    frame_timeout: float = 60.0
    """The same for one whose frame has begun and does not end."""
    write_timeout: float = 30.0
    """The same for one that does not read."""
    idle_timeout: float = 900.0
    """The same for one that asks for nothing and watches nothing; clients come back by themselves."""
    watch_interval: float = 5.0
    """A watch without changes is told so this often, by which both sides notice that the other is gone."""
    check_interval: float = 1.0
    """How often these times are looked at."""
