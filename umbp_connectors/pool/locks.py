"""Who holds a folder of the SSD tier."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from umbp_core.errors import TierUnavailable

_PID_BYTES = 10


class FolderInUse(TierUnavailable):
    """Another process holds the folder."""


class FolderLock:
    """An exclusive lock on a folder: ``flock`` on a file in it.  The kernel releases it when the holder dies.

    A process that was forked meanwhile has the file open too: it cannot give the lock back, and keeps it when the
    holder dies before it does.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str = "LOCK") -> None:
        self.path = Path(folder) / name
        self._fd = -1
        self._holder = 0

    @property
    def held(self) -> bool:
        """True between a successful :meth:`acquire` and :meth:`release`."""
        return self._fd >= 0

    def acquire(self, wait: bool = False) -> None:
        """Take the lock; does nothing when held.

        With ``wait`` it waits for the holder to let go, otherwise raises ``FolderInUse`` (naming its pid).
        Raises ``TierUnavailable`` when the lock file cannot be made.
        """
        if self._fd >= 0:
            return
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise unusable(self.path.parent, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise unusable(self.path.parent, error) from error
            raise FolderInUse(
                f"{self.path.parent} is in use by process {holder or 'unknown'}: a second engine with the same model "
                "needs an SSD folder of its own; this one goes on without an SSD tier"
            ) from error
        self._fd, self._holder = fd, os.getpid()
        # Always as long, written in place: a full disk must not keep an engine from what it stored.
        with contextlib.suppress(OSError):
            os.pwrite(fd, f"{os.getpid():<{_PID_BYTES}}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back; idempotent.  The file stays, for removing it could race with the next holder."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._holder == os.getpid():
                _unlock(fd)
            os.close(fd)


def is_locked(path: Path) -> bool:
    """True when some process holds the lock file ``path``.

    Takes the lock for a moment: ask only while holding what every taker of this lock holds too.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _unlock(fd)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _unlock(fd: int) -> None:
    """To close it alone would not do: processes that were forked meanwhile have it open too."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)


def unusable(folder: Path, error: OSError) -> TierUnavailable:
    """What to say when ``folder`` cannot serve as an SSD folder."""
    return TierUnavailable(
        f"the SSD folder {folder} cannot be used ({error.strerror}); "
        "name a folder that this user may create and write, with free space"
    )
