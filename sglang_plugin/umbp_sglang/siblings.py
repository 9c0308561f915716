"""KV that is the same on every TP rank: one rank stores it, its siblings on the same host read it there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed

from umbp_connectors.pool.local import GetStatus, LocalPool, PutStatus, StagedPut
from umbp_connectors.pool.sharing import SharedPoolReader, SharedPoolServer
from umbp_connectors.pool.sharing.sockets import PathInUse
from umbp_core.directory import TierStats
from umbp_core.ids import Identity, digest_of
from umbp_core.tiers import Tier

_LOOKUP_S = 1.0
"""A lookup that takes longer than this is a miss: a request waits for it."""


def meeting_place(identity: Identity, dp_rank: int) -> Path:
    """The socket where the ranks of one engine find the writer of ``identity``.

    Ranks of an engine are children of the same process and have one store of process groups.  Another engine has
    another store, also where its ranks are children of that process too, as with Ray or several engines in a script.
    A data-parallel group of attention ranks has a writer of its own.
    """
    engine = [os.getppid(), _rendezvous()]
    name = digest_of({"identity": identity.digest.hex(), "engine": engine, "dp": dp_rank}).hex()[:24]
    return Path(tempfile.gettempdir()) / f"umbp-{os.geteuid()}" / f"{name}.sock"


def _rendezvous() -> str:
    """Where the ranks of this engine found each other; empty in a process without process groups."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ""
    store = distributed.group.WORLD.get_group_store()
    while isinstance(store, distributed.PrefixStore):
        store = store.underlying_store
    if isinstance(store, distributed.TCPStore):
        return f"{store.host}:{store.port}"
    return str(store.path) if isinstance(store, distributed.FileStore) else ""


class SiblingServer:
    """Lets the siblings of this rank read ``pool`` at ``path``."""

    def __init__(self, pool: LocalPool, path: Path) -> None:
        self._server = SharedPoolServer(pool, path)
        self._path = path

    def open(self) -> None:
        """Be found.  Raises ``ConfigError`` when the path cannot be used.

        When that is because another pool is found there, nobody is any more: who comes could not tell whose it is.
        """
        try:
            self._server.open()
        except PathInUse:
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise

    def close(self) -> None:
        """Let nobody read any more; idempotent."""
        self._server.close()


class SiblingPool:
    """The writer's pool as its siblings have it: to read, and taking for granted what the writer stores.

    A writer that is not there, or does not answer, makes misses.
    """

    def __init__(self, identity: Identity, path: Path, timeout: float) -> None:
        self._reader = SharedPoolReader(path, identity, timeout)
        self._lookup = min(timeout, _LOOKUP_S)

    @property
    def failed(self) -> int:
        """Calls that the writer did not answer, or not in time."""
        return self._reader.failed

    def open(self) -> None:
        """Nothing to do: the reader connects when it is asked."""

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Any],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[PutStatus]:
        """Nothing to do: the writer stores the same bytes."""
        return [PutStatus.PRESENT] * len(keys)

    def stage(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Any],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> StagedPut:
        """Nothing to do: the writer stores the same bytes."""
        return StagedPut([PutStatus.PRESENT] * len(keys), lambda publish: publish)

    def get(self, keys: Sequence[bytes], buffers: Sequence[Any], timeout: float | None = None) -> list[GetStatus]:
        """Copy out of the writer's memory."""
        return self._reader.get(keys, buffers, timeout)

    def exists(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        """What the writer has."""
        return self._reader.exists(keys, self._patience(timeout))

    def count_prefix(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        """What the writer has, from the first on without a gap."""
        return self._reader.count_prefix(keys, self._patience(timeout))

    def stats(self, tier: Tier) -> TierStats | None:
        """Nothing: the tiers are the writer's."""
        return None

    def clear(self) -> int:
        """Nothing to do: the writer is told itself."""
        return 0

    def close(self) -> None:
        """End the connections."""
        self._reader.close()

    def _patience(self, timeout: float | None) -> float:
        return self._lookup if timeout is None else min(self._lookup, timeout)
