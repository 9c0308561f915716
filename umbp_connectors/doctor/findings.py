"""The form of the answers, and the order of the questions."""

from __future__ import annotations

import enum
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from umbp_connectors._version import __version__
from umbp_connectors.config import ResolvedConfig, resolve
from umbp_connectors.plugins import create_manager
from umbp_core.errors import ConfigError


class Status(enum.Enum):
    """How good a finding is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing is wrong."""
    WARNING = "warning"
    """Works, but less well than it could."""
    PROBLEM = "problem"
    """Does not work; the exit code says so."""


@dataclass(frozen=True)
class Finding:
    """One answer: what was looked at, what was found, and what to do where it is not as it should be."""

    topic: str
    status: Status
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """For ``--json``."""
        return {"topic": self.topic, "status": self.status.value, "found": self.found, "advice": self.advice}


def examine(extra: Mapping[str, Any], env: Mapping[str, str], file: str | None = None) -> Iterator[Finding]:
    """All findings, each as soon as it is there; an engine's takes seconds.  Changes nothing.

    ``extra``, ``env`` and ``file`` are those of :func:`umbp_connectors.config.resolve`.
    """
    from umbp_connectors.doctor import daemon, dynamo, engines, machine, master

    yield Finding("umbp-connectors", Status.OK, f"{__version__} with Python {platform.python_version()}")
    try:
        resolved = resolve(extra, env, file)
    except ConfigError as error:
        yield Finding("configuration", Status.PROBLEM, str(error), "correct the keys named here")
        resolved = resolve({}, {})
    else:
        yield _origins(resolved)
    config = resolved.config
    yield from _plugins(resolved)
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: machine.memory(config),
        lambda: machine.locked_memory(config),
        lambda: machine.huge_pages(config),
        lambda: machine.numa(config),
        lambda: machine.ssd(config),
        lambda: daemon.reached(config),
        lambda: master.answers(config),
        lambda: dynamo.environment(env),
        lambda: engines.hashes(env),
        engines.installed,
        lambda: engines.vllm(env, sys.executable),
        lambda: engines.sglang(env, sys.executable),
    )
    for check in checks:
        yield from check()


def _origins(resolved: ResolvedConfig) -> Finding:
    given = [key for key, origin in resolved.origins.items() if origin != "default"]
    return Finding("configuration", Status.OK, f"set: {', '.join(given)}" if given else "all defaults")


def _plugins(resolved: ResolvedConfig) -> Iterator[Finding]:
    host = create_manager(resolved.config)
    yield Finding("plug-ins", Status.OK, ", ".join(host.names))
    for plugin, hook in host.failures:
        yield Finding(
            f"plug-in {plugin}",
            Status.PROBLEM,
            f"fails in {hook}; the log says why",
            f"mend or uninstall it, or leave it out of UMBP_PLUGINS={','.join(host.names)}",
        )
