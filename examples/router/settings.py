"""The router's options."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from examples.router.costs import Speeds


class Policy(enum.Enum):
    """How a worker is chosen."""

    KV = "kv"
    """The one on which the first token would come first."""
    LOAD = "load"
    """The least busy one."""
    TURN = "turn"
    """The one that was not used for longest: round robin."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Times are seconds.  With ``workers`` only these are used; without, all that the master names (tag ``http=``)."""

    host: str = "127.0.0.1"
    port: int = 8080
    workers: tuple[str, ...] = ()
    master: str = ""
    hash_seed: str | None = None
    """The engines' ``PYTHONHASHSEED``, where they have one."""
    api_key: str = field(default="", repr=False)
    """Shown to workers that want one when the router looks at them; requests bring their own."""
    speeds: Speeds = field(default_factory=Speeds)
    refresh_interval: float = 2.0
    """How often the master's nodes and the workers' health, models and metrics are read."""
    look_timeout: float = 2.0
    """Deadline of each of these."""
    tokenize_timeout: float = 1.0
    match_timeout: float = 0.25
    connect_timeout: float = 2.0
    first_byte_timeout: float = 300.0
    """From a request sent to the first byte of its answer."""
    idle_timeout: float = 120.0
    """Between two pieces of an answer."""
    attempts: int = 3
    """Workers that are tried for one request, as long as none has answered."""
    max_body: int = 64 << 20
    """Bytes of a request."""
    policy: Policy = Policy.KV
