"""Pools that hold the parts of the same blocks, one for each rank: what has left one of them leaves the others too."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from umbp_connectors.daemon.watches import GATHER_S, QUIET_S, Watch, Watches
from umbp_connectors.pool.local import LocalPool
from umbp_core.directory import Change, EventKind
from umbp_core.errors import UmbpError
from umbp_core.ids import Identity, RankScope

logger = logging.getLogger(__name__)

_KEYS = 1024
"""How many are looked up, and evicted, in one go."""


def have_parts_of_same_blocks(one: Identity, other: Identity) -> bool:
    """Whether these are different ranks of one model that is divided in one way.

    Pipeline stages have different layers, hence layouts; other ranks have the same one.
    """
    stages = one.rank.pp_rank, other.rank.pp_rank
    same_model = one.namespace == other.namespace and (one.layout == other.layout or stages[0] != stages[1])
    return same_model and _division(one.rank) == _division(other.rank) and one.digest != other.digest


def _division(scope: RankScope) -> dict[str, object]:
    """Among how many the model is divided in which way, whoever of them this is."""
    described = scope.describe()
    return {name: value[1] if isinstance(value, list) else value for name, value in described.items()}


class Partings:
    """Has the ``companions`` of ``pool`` forget what it has no copy of any more, in a thread of its own.

    A block of which one rank has lost its part is of no use to the others: without this their parts would stay until
    they are the least recently used.  It is told by ``watches`` and may come late, or not at all after very many
    changes at once; nothing else depends on it.
    """

    def __init__(self, pool: LocalPool, watches: Watches, companions: Callable[[], Iterable[LocalPool]]) -> None:
        self._pool = pool
        self._watches = watches
        self._companions = companions
        self._watching = contextlib.ExitStack()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin with what leaves from now on."""
        watch = self._watching.enter_context(self._watches.watching())
        watch.take(0.0)  # what there is by now
        thread = threading.Thread(target=self._follow, args=(watch,), name="umbp-partings", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._watching.close()
            logger.warning("umbp: what leaves a pool stays with those of the other ranks: %s", error)
        else:
            self._thread = thread

    def join(self) -> None:
        """Wait for the thread, which ends when ``watches`` has ended; does nothing when it was not started."""
        if self._thread is not None:
            self._thread.join()
            self._watching.close()

    def _follow(self, watch: Watch) -> None:
        """Thread: until there is nothing more to follow."""
        while not watch.ended:
            try:
                self._part(watch.take(QUIET_S) or ())
            except UmbpError:  # a pool was closed
                logger.debug("what left a pool stays with those of the other ranks", exc_info=True)
            except Exception:  # thread top: a plug-in's policy may raise anything, the pools go on
                logger.exception("umbp: what leaves a pool stays with those of the other ranks from now on")
                return
            watch.rest(GATHER_S)

    def _part(self, changes: Sequence[Change]) -> None:
        left = itertools.chain.from_iterable(change.keys for change in changes if change.kind is EventKind.REMOVED)
        keys = list(dict.fromkeys(left))
        for start in range(0, len(keys), _KEYS):
            gone = self._pool.missing(keys[start : start + _KEYS])
            for companion in self._companions() if gone else ():
                companion.evict(gone)
