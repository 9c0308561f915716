"""A tier below DRAM that lies in any file system or object store that fsspec knows, one object per slot.

To be copied: this is all that a tier of your own needs.  ``tests/connectors/pool/test_fsspec_tier.py`` runs the shipped
suite against it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from umbp_connectors import UmbpConfig, hookimpl
from umbp_connectors.hookspecs import DramTierSpec, SsdTierSpec
from umbp_connectors.pool.capacity import namespace_dir
from umbp_connectors.pool.locks import FolderLock, unusable
from umbp_core.errors import ConfigError, StateError, TierUnavailable, TransferError

URL = "FSSPEC_TIER_URL"
"""Environment variable: where the objects go, such as ``s3://bucket/umbp`` or ``file:///mnt/share/umbp``."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_SLOT = re.compile(r"slot-(\d{8})")
_UNUSABLE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM))


@hookimpl
def umbp_make_tier(config: UmbpConfig, spec: DramTierSpec | SsdTierSpec) -> ObjectTier | None:
    """The tier at the configured URL; ``None`` leaves memory, and everything without a URL, to the built-in parts."""
    url = os.environ.get(URL, "")
    if isinstance(spec, DramTierSpec) or not url:
        return None
    if config.ssd_dir is None:
        raise ConfigError("the catalogue of what lies in the object store needs a folder on this host: set ssd_dir")
    capacity = int(config.ssd_capacity * spec.share) // spec.engines // spec.ranks
    home = namespace_dir(config.ssd_dir, spec.namespace) / f"rank{spec.rank}"
    tier = ObjectTier(
        f"{url.rstrip('/')}/{home.parent.name}/{home.name}-{spec.layout.hex()[:12]}",
        spec.slot_bytes,
        capacity // spec.slot_bytes,
        FolderLock(home),
    )
    tier.open()
    return tier


class ObjectTier:
    """``slots`` objects of at most ``slot_bytes`` below ``url``: both the tier and its slots.

    ``lock`` keeps a second owner on this host away.  Other hosts need a URL of their own: an object store has no locks.
    An object is as durable as its store makes it when a write returns.  Any thread.
    """

    def __init__(self, url: str, slot_bytes: int, slots: int, lock: FolderLock) -> None:
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.is_new = False
        self._url = url
        self._lock = lock
        self._fs: Any = None
        self._path = ""
        self._changed = threading.Condition()
        self._closed = False
        self._in_flight = 0

    @property
    def slab(self) -> ObjectTier:
        """The slots."""
        return self

    def open(self) -> None:
        """Take the place, see what is there and remove what does not fit any more.  Raises ``TierUnavailable``."""
        if self.slots < 1:
            raise TierUnavailable(f"{self._url}: the SSD capacity has no room for one object; set a larger one")
        try:
            self._lock.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(self._lock.path.parent, error) from error
        self._lock.acquire()
        try:
            self._fs, self._path = self._do(lambda: fsspec.core.url_to_fs(self._url))
            self._do(lambda: self._fs.makedirs(self._path, exist_ok=True))
            found = self._do(self._listed)
            numbers = {int(match[1]) for name in found if (match := _SLOT.search(name))}
            for number in sorted(numbers):
                if number >= self.slots:
                    self._do(lambda gone=number: self._fs.rm_file(self._name(gone)))
        except TransferError as error:
            self._lock.release()
            raise TierUnavailable(str(error)) from error
        except TierUnavailable:
            self._lock.release()
            raise
        self.is_new = not numbers

    def read_into(self, slot: int, view: Any, /) -> None:
        """Fill ``view`` from the start of the object.  Raises as ``umbp_core.ports.Slots`` says."""
        target = memoryview(view).cast("B")
        if target.readonly:
            raise StateError(f"{self._url}: slot {slot} cannot be read into memory that is read-only")
        data = self._transfer(slot, target, lambda name: self._fs.cat_file(name, start=0, end=target.nbytes))
        if len(data) < target.nbytes:
            raise TransferError(f"{self._name(slot)} has {len(data)} bytes instead of {target.nbytes}")
        target[:] = data

    def write_from(self, slot: int, view: Any, /) -> None:
        """Replace the object by ``view``.  Raises as ``umbp_core.ports.Slots`` says."""
        source = memoryview(view).cast("B")
        self._transfer(slot, source, lambda name: self._fs.pipe_file(name, bytes(source)))

    def sync(self) -> None:
        """Nothing to do: the store has what was written."""

    def close(self, timeout: float = 10.0) -> None:
        """Wait for transfers under way, then let the place go; idempotent."""
        with self._changed:
            self._closed = True
            if not self._changed.wait_for(lambda: self._in_flight == 0, timeout):
                logger.warning("%s does not answer; transfers are left behind", self._url)
        self._lock.release()

    def _listed(self) -> list[str]:
        """What lies there now; an object store has no folder where nothing does, and some list nothing anew."""
        self._fs.invalidate_cache(self._path)
        try:
            return list(self._fs.ls(self._path, detail=False))
        except FileNotFoundError:
            return []

    def _name(self, slot: int) -> str:
        return f"{self._path}/slot-{slot:08d}"

    def _transfer(self, slot: int, view: memoryview, move: Callable[[str], Result]) -> Result:
        if not (0 <= slot < self.slots and view.nbytes <= self.slot_bytes):
            raise StateError(f"{self._url} has {self.slots} slots of {self.slot_bytes} bytes; slot {slot} is outside")
        with self._changed:
            if self._closed:
                raise StateError(f"{self._url} is not open")
            self._in_flight += 1
        try:
            return self._do(lambda: move(self._name(slot)))
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def _do(self, call: Callable[[], Result]) -> Result:
        """Make a call of fsspec; whatever it raises becomes an error of ours."""
        try:
            return call()
        except Exception as error:  # drivers of stores raise errors of their own kinds
            kind = TierUnavailable if isinstance(error, OSError) and error.errno in _UNUSABLE else TransferError
            raise kind(f"{self._url}: {type(error).__name__}: {error}") from error


__all__ = ["URL", "ObjectTier", "umbp_make_tier"]
