"""Who a reporting engine is: the name of its node, and what its registration says."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from umbp_connectors.config_model import UmbpConfig
from umbp_core.master.model import Registration

Engine = Literal["vllm", "sglang"]
Role = Literal["prefill", "decode", "both"]

EVERY_INTERFACE = frozenset({"", "*", "0.0.0.0", "::"})
"""What an engine's ``--host`` says when it listens on every interface."""

TAILS_UNKNOWN = "unknown"
"""Of the tag ``tails``: a hit needs windows or states of some layers too, of which nobody is told."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What an engine knows of itself.  ``port`` is that of its HTTP server, ``None`` where it has none (offline use).

    ``dp``, ``pp`` and ``tp`` are the ranks of this node in the engine, 0 where one node stands for all of them;
    ``several`` says whether other ranks of the same engine report too, each as a node of its own.  ``tags`` are added
    to the registration's.
    """

    engine: Engine
    model: str
    version: str
    role: Role
    host: str
    port: int | None
    dp: int = 0
    pp: int = 0
    tp: int = 0
    several: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)


def node_id_of(facts: NodeFacts, config: UmbpConfig) -> str:
    """The node's name: the same after a restart, and another one for every rank that reports.

    An engine that serves this machine only has the machine's name in it: others have the same loopback address.
    Without a port the process id stands in its place, and the name is another one after a restart.
    """
    ranks = f":dp{facts.dp}:pp{facts.pp}:tp{facts.tp}"
    if config.node_id:
        return config.node_id + (ranks if facts.several else "")
    door = f"pid{os.getpid()}" if facts.port is None else str(facts.port)
    role = "" if facts.role == "both" else f":{facts.role}"
    host = socket.gethostname() if _is_loopback(facts.host) else facts.host
    return f"{host}:{door}{ranks}{role}"


def registration_of(facts: NodeFacts, config: UmbpConfig) -> Registration:
    """How the node introduces itself.  The user's tags replace those of the same name."""
    tags = {
        "engine": facts.engine,
        "model": facts.model,
        "version": facts.version,
        "role": facts.role,
        "dp": str(facts.dp),
        "pp": str(facts.pp),
        "tp": str(facts.tp),
    }
    if facts.port is not None:
        host = f"[{facts.host}]" if ":" in facts.host else facts.host
        tags["http"] = f"{host}:{facts.port}"
    if config.min_load_blocks > 1:
        tags["min_load"] = str(config.min_load_blocks)
    tags |= facts.tags
    tags |= dict(each.split("=", 1) for each in config.node_tags)
    return Registration(
        node_id_of(facts, config),
        node_address=config.node_address or facts.host,
        tags=tuple(f"{name}={value}" for name, value in tags.items()),
    )


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
