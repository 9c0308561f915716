"""The DRAM tier's memory: one mapping, cut into pages."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from pathlib import Path

import numpy as np

from umbp_connectors.pool import machine
from umbp_connectors.pool.buffers import Bytes, address_of, round_up
from umbp_core.errors import ConfigError, StateError, TierUnavailable

logger = logging.getLogger(__name__)

_NAME = "umbp-arena"
_PREFAULT_SLICE = 32 << 20
"""Bytes per call: short enough that closing does not wait, long enough that the calls cost nothing."""
_RESERVE = 256 << 20
"""Prefaulting stops when the machine or the container has less to spare than this: it must not get anyone killed."""

_CANNOT_POPULATE = (errno.EINVAL, errno.ENOSYS)
"""What kernels before 5.14 say."""


class Arena:
    """``pages`` pages for objects, then ``staging_pages`` pages for bytes on their way, all of ``page_bytes``.

    The memory is a memfd, mapped shared, so that another process of the same user can map the very same pages
    (:meth:`attach`).  Unless it is to be ``shared``, it is memory of this process alone where the kernel can make that
    present: kernels give such memory transparent huge pages, but few do so to shared memory, and a disk takes 1 MiB in
    one piece faster than scattered over pages of 4 KiB (measured: 2.6 GB/s instead of 1.6, reading 2.0 instead of 1.2).
    A child of ``fork`` finds zeros there, so that nothing is copied on its behalf.

    Pages are zero at first.  :meth:`open` maps the memory and returns at once; a background thread then makes the pages
    present, because a copy into a page that is not there yet costs a factor of five.

    Any thread may use the views.  A view keeps its memory alive: :meth:`close` always returns, and the system gets
    the memory back once the last view is gone.
    """

    def __init__(
        self,
        page_bytes: int,
        pages: int,
        staging_pages: int = 0,
        huge_pages: bool = False,
        numa_node: int = -1,
        prefault: bool = True,
        shared: bool = True,
    ) -> None:
        if page_bytes <= 0 or pages < 0 or staging_pages < 0 or pages + staging_pages == 0:
            raise StateError(
                f"an arena needs pages of at least one byte, got {pages}+{staging_pages} pages of {page_bytes} bytes"
            )
        self.page_bytes = page_bytes
        self.pages = pages
        self.staging_pages = staging_pages
        self._huge_pages = huge_pages
        self._numa_node = numa_node
        self._prefault = prefault
        self._shared = shared
        self._fd = -1
        self._mapping: mmap.mmap | None = None
        self._array: Bytes | None = None
        self._flat: Bytes | None = None
        self._present = 0
        self._reserved = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in all pages, staging included."""
        return (self.pages + self.staging_pages) * self.page_bytes

    @property
    def fd(self) -> int:
        """The memfd, not inheritable.  Raises ``StateError`` unless open, and when the memory is private."""
        self._opened()
        if self._fd < 0:
            raise StateError("the arena's memory is private to its process; open it as shared")
        return self._fd

    @property
    def address(self) -> int:
        """Where page 0 lies in this process.  Raises ``StateError`` unless open."""
        return address_of(self._opened())

    @property
    def array(self) -> Bytes:
        """All pages as uint8 of shape (pages + staging_pages, page_bytes), writable, no copy."""
        return self._opened()

    @property
    def huge(self) -> bool:
        """True when the memory is huge pages: those that were asked for and were to be had."""
        return self._reserved

    @property
    def prefaulted_bytes(self) -> int:
        """How many bytes from the start are known to be present."""
        return self._present

    @property
    def progress(self) -> float:
        """How much of the arena is prefaulted, 0.0 to 1.0; stays where it is when prefaulting ended early."""
        return self._present / self.nbytes

    def page(self, index: int, nbytes: int | None = None) -> memoryview:
        """The first ``nbytes`` of page ``index`` (all of it by default), writable, no copy.

        Raises ``StateError`` when there is no such page or it is shorter.
        """
        return self.page_array(index, nbytes).data

    def page_array(self, index: int, nbytes: int | None = None) -> Bytes:
        """As :meth:`page`, as a numpy array: what copies of large pieces want, since numpy releases the GIL."""
        length = self.page_bytes if nbytes is None else nbytes
        if not (0 <= index < self.pages + self.staging_pages and 0 <= length <= self.page_bytes):
            raise StateError(
                f"page {index} with {length} bytes is outside of an arena of "
                f"{self.pages}+{self.staging_pages} pages of {self.page_bytes} bytes"
            )
        return self._opened()[index, :length]

    def open(self) -> None:
        """Reserve and map the memory, start prefaulting.  Does nothing when already open.

        Raises ``ConfigError`` when the arena is larger than the machine's memory, ``TierUnavailable`` when the
        system refuses the memory.
        """
        if self._array is not None:
            return
        limits = machine.memory_limits()
        if self.nbytes > limits.usable:
            raise ConfigError(
                f"a DRAM tier of {self.nbytes / 2**30:.1f} GiB does not fit this machine, which has "
                f"{limits.describe()}; set a smaller dram_capacity"
            )
        try:
            if not ((self._huge_pages and self._open_huge()) or (not self._shared and self._open_private())):
                self._map(os.memfd_create(_NAME, os.MFD_CLOEXEC), self.nbytes)
        except OSError as error:
            raise TierUnavailable(
                f"the system refuses {self.nbytes / 2**30:.1f} GiB of memory for the DRAM tier "
                f"({error.strerror}); set a smaller dram_capacity"
            ) from error
        if self._numa_node >= 0:
            self._bind()
        if self._prefault:
            self._stop.clear()
            self._thread = threading.Thread(target=self._populate_all, name="umbp-prefault", daemon=True)
            self._thread.start()

    @classmethod
    def attach(cls, pid: int, fd: int, page_bytes: int, pages: int, staging_pages: int = 0) -> Arena:
        """Map the arena that process ``pid`` of the same user holds under its descriptor ``fd``; returns it open.

        The pages are those of the owner, byte for byte and at once; they stay valid when the owner closes or dies.
        Raises ``TierUnavailable`` when there is no such arena or its size is another one.
        """
        arena = cls(page_bytes, pages, staging_pages, prefault=False)
        path = Path(f"/proc/{pid}/fd/{fd}")
        try:
            if not str(path.readlink()).startswith(f"/memfd:{_NAME}"):
                raise TierUnavailable(f"descriptor {fd} of process {pid} is not an arena")
            opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TierUnavailable(
                f"the arena of process {pid} cannot be mapped ({error.strerror}); it must run as the same user"
            ) from error
        size = os.fstat(opened).st_size
        if size < arena.nbytes:
            os.close(opened)
            raise TierUnavailable(
                f"the arena of process {pid} has {size} bytes instead of {arena.nbytes}; "
                "both sides must use the same configuration"
            )
        arena._map(opened, size, truncate=False)
        arena._present = arena.nbytes
        return arena

    def wait_prefaulted(self, timeout: float) -> bool:
        """Wait until prefaulting has ended, for at most ``timeout`` seconds; true when it did."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            return not thread.is_alive()
        return True

    def close(self) -> None:
        """Stop prefaulting and give the memory back; idempotent, never raises because of views.

        Views handed out stay readable and writable; the memory is freed when the last of them is released.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        mapping, self._mapping, self._array, self._flat = self._mapping, None, None, None
        if mapping is None:
            return
        try:
            mapping.close()
        except BufferError:
            logger.debug("arena closed while views of it are alive; its memory is freed with the last of them")
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _opened(self) -> Bytes:
        if self._array is None:
            raise StateError("the arena is not open")
        return self._array

    def _open_huge(self) -> bool:
        """Try reserved huge pages; false (with one warning) when there are none to be had."""
        unit = machine.meminfo("Hugepagesize") or 2 << 20
        try:
            flags = os.MFD_CLOEXEC | os.MFD_HUGETLB
            self._map(os.memfd_create(_NAME, flags), round_up(self.nbytes, unit))
        except OSError as error:
            logger.warning(
                "no huge pages for the DRAM tier (%s): %d free of %d MiB each, %d needed; ordinary pages are used. "
                "Reserve them with sysctl vm.nr_hugepages.",
                error.strerror,
                machine.meminfo("HugePages_Free") // 1024,
                unit >> 20,
                round_up(self.nbytes, unit) // unit,
            )
            return False
        self._reserved = True
        return True

    def _open_private(self) -> bool:
        """Take memory of this process alone; false where the kernel cannot make it present while others write to it."""
        mapping = mmap.mmap(-1, self.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise_huge(mapping)
        mapping.madvise(machine.MADV_WIPEONFORK)
        flat: Bytes = np.frombuffer(mapping, dtype=np.uint8)
        try:
            machine.populate(address_of(flat), mmap.PAGESIZE)
        except OSError as error:
            if error.errno not in _CANNOT_POPULATE:
                raise
            return False
        self._use(mapping, flat)
        return True

    def _map(self, fd: int, nbytes: int, truncate: bool = True) -> None:
        """Map ``nbytes`` of ``fd``, which belongs to this object from here on; closed when that fails."""
        try:
            if truncate:
                os.ftruncate(fd, nbytes)
            mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(fd)
            raise
        _advise_huge(mapping)
        self._fd = fd
        self._use(mapping, np.frombuffer(mapping, dtype=np.uint8))

    def _use(self, mapping: mmap.mmap, flat: Bytes) -> None:
        """The memory is that of ``mapping``, ``flat``."""
        self._mapping, self._flat = mapping, flat
        self._array = flat[: self.nbytes].reshape(self.pages + self.staging_pages, self.page_bytes)

    def _bind(self) -> None:
        flat = self._flat
        if flat is None:
            return
        try:
            machine.prefer_node(address_of(flat), flat.nbytes, self._numa_node)
        except OSError as error:
            logger.warning(
                "the DRAM tier is not placed on NUMA node %d (%s); the kernel chooses the node",
                self._numa_node,
                error.strerror or error,
            )

    def _populate_all(self) -> None:
        """Thread: make every page present, slice by slice, until done, stopped or short of memory."""
        flat = self._flat
        if flat is None:
            return
        for start in range(0, self.nbytes, _PREFAULT_SLICE):
            if self._stop.is_set():
                return
            piece = flat[start : min(start + _PREFAULT_SLICE, self.nbytes)]
            if not self._reserved and machine.memory_to_spare() < piece.nbytes + _RESERVE:
                self._warn_stopped("the machine has no more memory to spare; set a smaller dram_capacity")
                return
            try:
                _populate(piece)
            except OSError as error:
                self._warn_stopped(str(error))
                return
            self._present = start + piece.nbytes

    def _warn_stopped(self, why: str) -> None:
        logger.warning(
            "prefaulting of the DRAM tier stopped at %.1f of %.1f GiB: %s",
            self._present / 2**30,
            self.nbytes / 2**30,
            why,
        )


def _advise_huge(mapping: mmap.mmap) -> None:
    """Ask for transparent huge pages; many kernels have none for shared memory, and then nothing is lost."""
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        logger.debug("transparent huge pages are not available: %s", error.strerror)


def _populate(piece: Bytes) -> None:
    """Make ``piece`` present without changing it; other threads may write to it meanwhile."""
    try:
        machine.populate(address_of(piece), piece.nbytes)
    except OSError as error:
        if error.errno not in _CANNOT_POPULATE:
            raise
        # Reading allocates a shared page just as writing does, and cannot overwrite what a transfer puts there.
        piece[:: mmap.PAGESIZE].max()
