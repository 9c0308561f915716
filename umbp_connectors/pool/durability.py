"""When what is written to SSD survives a power failure.

What a process has written survives its death anyhow: the system has it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Literal

from umbp_core.errors import StateError, TierUnavailable, TransferError

Durability = Literal["strict", "batched", "relaxed"]
"""`strict`: when the write returns.  `batched`: within :data:`BATCH_S` and the time that the disk takes to sync.
`relaxed`: whenever the system writes it back.
"""

BATCH_S = 1.0

logger = logging.getLogger(__name__)


class TellingSync:
    """``sync`` for several who have to know whether it worked; one at a time.  Any thread.

    The system says only once that something could not be written: whoever asks next hears that all is well.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._one = threading.Lock()
        self._failed = 0
        self._untold: TransferError | TierUnavailable | None = None

    @property
    def failed(self) -> int:
        """How often it did not work, as far as those heard of it that called it before."""
        return self._failed

    def __call__(self) -> None:
        """Bring the bytes to the device.  Raises also what :meth:`behind` met since this was called last."""
        with self._one:
            met, self._untold = self._untold, None
            try:
                self._sync()
                if met is not None:
                    raise met
            except (TransferError, TierUnavailable):
                self._failed += 1
                raise

    def behind(self) -> None:
        """The same for somebody who does not wait for it: what it raises, the next call raises too."""
        with self._one:
            try:
                self._sync()
            except (TransferError, TierUnavailable) as error:
                self._untold = error
                raise


class SyncBehind:
    """A thread that calls ``sync`` at most ``interval_s`` after the first :meth:`note` that no sync has followed."""

    def __init__(self, sync: Callable[[], None], name: str, interval_s: float = BATCH_S) -> None:
        self._sync = sync
        self._name = name
        self._interval_s = interval_s
        self._changed = threading.Condition()
        self._dirty = False
        self._closing = False
        self._warned = False
        self._syncs = 0
        self._thread: threading.Thread | None = None

    @property
    def syncs(self) -> int:
        """How often the bytes were brought to the device."""
        return self._syncs

    def start(self) -> None:
        """Start the thread."""
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=f"umbp-sync-{self._name}", daemon=True)
        self._thread.start()

    def note(self) -> None:
        """Something was written.  Does not wait."""
        if not self._dirty:
            with self._changed:
                self._dirty = True
                self._changed.notify_all()

    def close(self, timeout: float) -> None:
        """Sync what is noted, for at most ``timeout`` seconds, and end the thread; idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(timeout)

    def _work(self) -> None:
        """Thread: one sync after the other until closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closing)
                self._changed.wait_for(lambda: self._closing, self._interval_s)
                if not self._dirty:
                    return
                self._dirty = False
                last = self._closing
            try:
                self._sync()
                self._syncs += 1
            except StateError:  # closed meanwhile by somebody who did not wait
                return
            except (TransferError, TierUnavailable) as error:
                if not self._warned:
                    self._warned = True
                    logger.warning("what was written lately may not survive a power failure: %s", error)
            if last:
                return
