"""The SSD tier's bytes: one preallocated file of equal slots."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from umbp_connectors.pool.buffers import Bytes, ReadableBuffer, WritableBuffer, address_of, as_bytes, round_up
from umbp_connectors.pool.durability import Durability, SyncBehind, TellingSync
from umbp_core.errors import StateError, TierUnavailable, TransferError

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
"""What direct I/O may ask of offset, address and length on any file system we know."""

_UNUSABLE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG))
"""Errors after which the tier cannot take bytes; anything else concerns one transfer."""


class SlabFile:
    """``slots`` slots of ``slot_bytes`` (a multiple of 4096) each; slot ``i`` starts at byte ``i * slot_bytes``.

    The space is taken from the file system when the file is opened, so that a write never finds the disk full and the
    file never grows beyond ``slots * slot_bytes``.  An existing file keeps what its first slots hold: its slots are
    neither cleared nor trusted, the checksums decide.

    Reads and writes go around the page cache (``O_DIRECT``) where the file system can; the GIL is released
    meanwhile.  Views that start at a multiple of 4096 with such a length go as they are, others through one copy.
    Any number of threads may read and write different slots at once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        slot_bytes: int,
        slots: int,
        direct_io: bool = True,
        durability: Durability = "relaxed",
    ) -> None:
        if slot_bytes <= 0 or slot_bytes % ALIGNMENT or slots <= 0:
            raise StateError(f"{path}: slots of {slot_bytes} bytes are not a multiple of {ALIGNMENT}, or not even one")
        self.path = Path(path)
        self.slot_bytes = slot_bytes
        self.slots = slots
        self._want_direct = direct_io
        self._write_flags = os.RWF_DSYNC if durability == "strict" else 0
        self._synced = TellingSync(self._sync)
        self._behind = SyncBehind(self._synced.behind, self.path.name) if durability == "batched" else None
        self._direct = False
        self._read_only = False
        self._is_new = False
        self._fd = -1
        self._guard = threading.Condition()
        self._closing = False
        self._in_flight = 0
        self._bounces: list[mmap.mmap] = []

    @property
    def nbytes(self) -> int:
        """The length of the file."""
        return self.slots * self.slot_bytes

    @property
    def is_new(self) -> bool:
        """True when :meth:`open` made the file: whatever a catalogue says about it, it holds nothing."""
        return self._is_new

    @property
    def direct(self) -> bool:
        """True when reads and writes go around the page cache."""
        return self._direct

    def open(self, read_only: bool = False) -> None:
        """Create or reopen the file and take its space.  Does nothing when already open.

        Raises ``TierUnavailable`` when it cannot be had: disk full, read-only, no permission, not a plain file,
        shorter than promised (read only).  A file that did not exist before is removed again in that case.
        """
        if self._fd >= 0:
            return
        existed = self.path.exists()
        fd = self._open_file(os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT)
        try:
            self._take_space(fd, read_only)
        except TierUnavailable:
            os.close(fd)
            if not existed:
                self.path.unlink(missing_ok=True)
            raise
        self._read_only = read_only
        self._is_new = not existed
        self._direct = False
        if self._want_direct:
            fd = self._try_direct(fd, read_only)
        self._fd = fd
        self._closing = False
        if self._behind is not None and not read_only:
            self._behind.start()

    def read_into(self, slot: int, view: WritableBuffer) -> None:
        """Fill ``view`` (at most one slot long) from the start of ``slot``.

        Raises ``TransferError`` when the bytes cannot be read; ``view`` then holds garbage.
        """
        target = as_bytes(view)
        if not target.flags.writeable:
            raise StateError(f"{self.path}: slot {slot} cannot be read into memory that is read-only")
        self._transfer(slot, target, self._read_aligned if self._passes(target) else self._read_bounced)

    def read_run(self, slot: int, views: Sequence[WritableBuffer]) -> None:
        """Fill each of ``views``, which are as long as a slot, from a slot of its own, from ``slot`` on, in one go.

        Raises as :meth:`read_into`; any of them may hold garbage then.
        """
        targets = self._run_of(slot, views)
        if len(targets) == 1 or not all(target.flags.writeable and self._passes(target) for target in targets):
            for number, target in enumerate(targets):
                self.read_into(slot + number, target)
            return
        self._moved(slot, lambda: self._read_all(slot * self.slot_bytes, targets))

    def write_from(self, slot: int, view: ReadableBuffer) -> None:
        """Write ``view`` (at most one slot long) to the start of ``slot``; the slot's tail is undefined afterwards.

        The bytes survive the death of this process, and that of the machine as the slab's ``durability`` says; after
        :meth:`sync` at the latest.
        Raises ``TierUnavailable`` when the disk takes no more bytes, ``TransferError`` when this write failed; the
        slot then holds garbage.
        """
        source = as_bytes(view)
        self._transfer(slot, source, self._write_aligned if self._passes(source) else self._write_bounced)
        if self._behind is not None:
            self._behind.note()

    def write_run(self, slot: int, views: Sequence[ReadableBuffer]) -> None:
        """Write each of ``views``, which are as long as a slot, to a slot of its own, from ``slot`` on, in one go.

        A disk takes one large piece faster than several small ones.  Raises as :meth:`write_from`.
        """
        sources = self._run_of(slot, views)
        if len(sources) == 1 or not all(map(self._passes, sources)):
            for number, source in enumerate(sources):
                self.write_from(slot + number, source)
            return
        self._moved(slot, lambda: self._write_all(slot * self.slot_bytes, sources))
        if self._behind is not None:
            self._behind.note()

    def sync(self) -> None:
        """Return when everything written before is on the device.  Raises as :meth:`write_from`.

        So it does when the syncs of ``batched`` failed since this was called last.
        """
        self._synced()

    def _sync(self) -> None:
        self._enter()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._typed(error, "cannot be brought to the disk") from error
        finally:
            self._leave()

    def close(self, timeout: float = 10.0) -> None:
        """Wait for the transfers under way, then close; idempotent.  Later transfers raise ``StateError``.

        A disk that does not answer within ``timeout`` seconds costs a warning and keeps the file open: its
        descriptor must not be reused under a transfer.
        """
        if self._behind is not None:
            self._behind.close(timeout)
        with self._guard:
            self._closing = True
            if not self._guard.wait_for(lambda: self._in_flight == 0, timeout):
                logger.warning("%s stays open: the disk does not answer", self.path)
                return
            fd, self._fd = self._fd, -1
            self._bounces.clear()
        if fd >= 0:
            os.close(fd)

    # -- opening

    def _open_file(self, flags: int) -> int:
        try:
            fd = os.open(self.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise self._typed(error, "cannot be opened") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise TierUnavailable(f"{self.path} is not a plain file; the SSD tier needs a folder of its own")
        return fd

    def _take_space(self, fd: int, read_only: bool) -> None:
        before = os.fstat(fd).st_size
        if read_only:
            if before < self.nbytes:
                raise TierUnavailable(f"{self.path} has {before} bytes instead of {self.nbytes}")
            return
        try:
            if before > self.nbytes:
                os.ftruncate(fd, self.nbytes)
            os.posix_fallocate(fd, 0, self.nbytes)
        except OSError as error:
            os.ftruncate(fd, min(before, self.nbytes))
            free = os.statvfs(self.path.parent)
            raise TierUnavailable(
                f"{self.path}: the disk does not give the {self.nbytes / 2**30:.2f} GiB of the SSD tier "
                f"({error.strerror}; {free.f_bavail * free.f_frsize / 2**30:.2f} GiB are free); "
                "set a smaller SSD capacity or another SSD folder"
            ) from error

    def _try_direct(self, fd: int, read_only: bool) -> int:
        """A descriptor with ``O_DIRECT`` if this file system really reads (and writes) through one, else ``fd``."""
        access = os.O_RDONLY if read_only else os.O_RDWR
        bounce = mmap.mmap(-1, ALIGNMENT)
        try:
            direct = os.open(self.path, access | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            logger.info("%s: no direct I/O here (%s); the page cache is used", self.path, error.strerror)
            return fd
        try:
            works = os.preadv(direct, [bounce], 0) == ALIGNMENT
            if works and not read_only:
                works = os.pwritev(direct, [bounce], 0) == ALIGNMENT
        except OSError as error:
            logger.info("%s: direct I/O is refused (%s); the page cache is used", self.path, error.strerror)
            works = False
        os.close(fd if works else direct)
        self._direct = works
        return direct if works else fd

    # -- moving bytes

    def _passes(self, view: Bytes) -> bool:
        """True when ``view`` may go to the file as it is."""
        return not self._direct or not (address_of(view) % ALIGNMENT or view.nbytes % ALIGNMENT)

    def _transfer(self, slot: int, view: Bytes, move: Callable[[int, Bytes], None]) -> None:
        if not (0 <= slot < self.slots and view.nbytes <= self.slot_bytes):
            raise StateError(
                f"{self.path}: {view.nbytes} bytes of slot {slot} are outside of "
                f"{self.slots} slots of {self.slot_bytes} bytes"
            )
        self._moved(slot, lambda: move(slot * self.slot_bytes, view))

    def _run_of(self, slot: int, views: Sequence[ReadableBuffer]) -> list[Bytes]:
        """The bytes of ``views`` for as many slots.  Raises ``StateError`` unless they fill slots that there are."""
        run = [as_bytes(view) for view in views]
        if any(view.nbytes != self.slot_bytes for view in run):
            raise StateError(f"{self.path}: what moves to or from several slots in one go has to fill each of them")
        if not 0 <= slot <= self.slots - len(run):
            raise StateError(f"{self.path}: slots {slot} to {slot + len(run)} are not all among {self.slots}")
        return run

    def _moved(self, slot: int, move: Callable[[], None]) -> None:
        """``move()``, from or to the slots from ``slot`` on, while the file is kept open."""
        self._enter()
        try:
            move()
        except OSError as error:
            raise self._typed(error, f"slot {slot} cannot be moved") from error
        finally:
            self._leave()

    def _read_aligned(self, offset: int, view: Bytes) -> None:
        done = 0
        while done < view.nbytes:
            count = os.preadv(self._fd, [view.data[done:]], offset + done)
            if count == 0:
                raise TransferError(
                    f"{self.path} ends at byte {offset + done}: it was shortened from outside; "
                    "what was behind is lost and is computed again"
                )
            done += self._whole(count, view.nbytes - done)

    def _read_all(self, offset: int, views: Sequence[Bytes]) -> None:
        """All of ``views`` at once; what a short transfer leaves, one by one."""
        count = os.preadv(self._fd, [view.data for view in views], offset)
        done = count // self.slot_bytes
        for number, view in enumerate(views[done:], done):
            self._read_aligned(offset + number * self.slot_bytes, view)

    def _write_aligned(self, offset: int, view: Bytes) -> None:
        done = 0
        while done < view.nbytes:
            count = os.pwritev(self._fd, [view.data[done:]], offset + done, self._write_flags)
            done += self._whole(count, view.nbytes - done)

    def _write_all(self, offset: int, views: Sequence[Bytes]) -> None:
        """All of ``views`` at once; what a short transfer leaves, one by one."""
        count = os.pwritev(self._fd, [view.data for view in views], offset, self._write_flags)
        done = count // self.slot_bytes
        for number, view in enumerate(views[done:], done):
            self._write_aligned(offset + number * self.slot_bytes, view)

    def _whole(self, count: int, wanted: int) -> int:
        """How much of a short transfer counts: direct I/O can only go on at an aligned place."""
        if count == wanted or not self._direct:
            return count
        whole = count // ALIGNMENT * ALIGNMENT
        if whole == 0:
            raise TransferError(f"{self.path}: the disk moved {count} of {wanted} bytes and then nothing more")
        return whole

    def _read_bounced(self, offset: int, view: Bytes) -> None:
        bounce, piece = self._borrow(view.nbytes)
        try:
            self._read_aligned(offset, piece)
            view[:] = piece[: view.nbytes]
        finally:
            self._bounces.append(bounce)

    def _write_bounced(self, offset: int, view: Bytes) -> None:
        bounce, piece = self._borrow(view.nbytes)
        try:
            piece[: view.nbytes] = view
            self._write_aligned(offset, piece)
        finally:
            self._bounces.append(bounce)

    def _borrow(self, nbytes: int) -> tuple[mmap.mmap, Bytes]:
        """An aligned buffer of a slot's size, and its first ``nbytes`` rounded up.  Kept, one per busy thread."""
        try:
            bounce = self._bounces.pop()
        except IndexError:
            bounce = mmap.mmap(-1, self.slot_bytes)
        return bounce, np.frombuffer(bounce, dtype=np.uint8, count=round_up(nbytes, ALIGNMENT))

    # -- life

    def _enter(self) -> None:
        """Keep the descriptor from being closed (and its number from being reused) under a transfer."""
        with self._guard:
            if self._fd < 0 or self._closing:
                raise StateError(f"{self.path} is not open")
            self._in_flight += 1

    def _leave(self) -> None:
        with self._guard:
            self._in_flight -= 1
            if self._closing and self._in_flight == 0:
                self._guard.notify_all()

    def _typed(self, error: OSError, what: str) -> TierUnavailable | TransferError:
        message = f"{self.path} {what}: {error.strerror}"
        opening = self._fd < 0
        if opening or error.errno in _UNUSABLE:
            return TierUnavailable(f"{message}; the SSD tier is not used until the folder is usable again")
        return TransferError(message)
