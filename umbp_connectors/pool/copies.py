"""Copies between a caller's memory and pages: of one object, or of several small ones that lie side by side in both."""

from __future__ import annotations

from collections.abc import Sequence

from umbp_connectors.pool.buffers import Bytes
from umbp_connectors.pool.checksums import copy_checksummed
from umbp_connectors.pool.rows import RowViews, Views, copy_rows_in, copy_rows_out


def copy_in(prefix: bytes, keys: Sequence[bytes], views: Views, first: int, pages: Bytes) -> list[bytes]:
    """Copy the objects of ``views`` from ``first`` on to ``pages``, of shape (objects, bytes); their checksums.

    How many that may be, :func:`~umbp_connectors.pool.rows.stretches` says; an object's key is ``prefix`` and its own.
    """
    stop = first + len(pages)
    if isinstance(views, RowViews) and views.are_small:
        names = [prefix + key for key in keys[first:stop]]
        return copy_rows_in(names, pages[:, : views.nbytes_each], views.together(first, stop))
    view = views[first]
    return [copy_checksummed(prefix + keys[first], pages[0, : view.nbytes], view)]


def copy_out(prefix: bytes, keys: Sequence[bytes], views: Views, first: int, pages: Bytes) -> list[bytes]:
    """The same from ``pages`` to ``views``."""
    stop = first + len(pages)
    if isinstance(views, RowViews) and views.are_small:
        names = [prefix + key for key in keys[first:stop]]
        return copy_rows_out(names, views.together(first, stop), pages[:, : views.nbytes_each])
    view = views[first]
    return [copy_checksummed(prefix + keys[first], view, pages[0, : view.nbytes])]
