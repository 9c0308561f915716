"""Where the pages of a host pool lie: told by arrays where addresses are regular, by SGLang's flat pages elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import (
    KINDS,
    LAYERS,
    PAGE,
    contents,
    hashes,
    mha_pool,
    page_bytes,
    pool_of,
    rows,
    storage_config,
    wipe,
)
from umbp_core.errors import ConfigError
from umbp_sglang.host_pages import FlatPages, StridedPages, page_access


def joined(buffer: Any) -> bytes:
    parts = buffer if isinstance(buffer, tuple) else (buffer,)
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_is_read_and_written_in_place(kind: str) -> None:
    pool = pool_of(kind)
    access = page_access(pool)
    assert isinstance(access, StridedPages)
    [sources] = access.sources(rows(3, 0, 23), 3)
    assert [joined(source) for source in sources] == contents(pool, [3, 0, 23])
    assert access.object_bytes == len(page_bytes(pool, 0))
    for source in sources:
        parts = source if isinstance(source, tuple) else (source,)
        for part in parts:
            part[...] = 7
    assert set(page_bytes(pool, 3) + page_bytes(pool, 23)) == {7}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("mha-page_first", (2,)),
        ("mha-layer_first", (2 * LAYERS,)),
        ("mla-page_first", ()),
        ("mla-layer_first", (LAYERS,)),
    ],
)
def test_a_page_is_one_array(kind: str, shape: tuple[int, ...]) -> None:
    """Segments that are evenly spaced need one array, whose last axis is what lies together."""
    access = page_access(pool_of(kind))
    [[source]] = access.sources(rows(5), 1)
    assert isinstance(source, np.ndarray)
    assert source.shape[:-1] == shape
    assert source.strides[-1] == 1


class Irregular:
    """A pool whose pages do not lie where the first two let expect: ``order`` says which page lies where."""

    def __init__(self, pool: Any, order: Callable[[int], int], pages: int) -> None:
        self._pool = pool
        self._order = order
        self.size = pages * PAGE

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    @property
    def logical_size(self) -> int:
        return self.size

    def _place(self, index: int) -> int:
        return self._order(index // PAGE) * PAGE + index % PAGE

    def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
        return self._pool.get_page_buffer_meta(torch.tensor([self._place(index) for index in indices.tolist()]))

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return self._pool.get_data_page(self._place(index), flat)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        self._pool.set_from_flat_data_page(self._place(index), data_page)


ORDERS = {
    "swapped": lambda page: page ^ 1,
    "one-off": lambda page: {10: 11, 11: 10}.get(page, page),
    "backwards": lambda page: 15 - page,
    "last-off": lambda page: 20 if page == 15 else page,
}


@pytest.mark.parametrize("order", ORDERS)
def test_irregular_addresses_are_noticed(stores: Stores, order: str) -> None:
    """Such a pool is copied page by page, and its pages are right."""
    pool = Irregular(mha_pool(), ORDERS[order], 16)
    assert isinstance(page_access(pool), FlatPages)
    store = stores(storage_config(), pool)
    keys, want = hashes(16), contents(pool, range(16))
    assert all(store.batch_set_v1(keys, rows(*range(16))))
    wipe(pool)
    assert all(store.batch_get_v1(keys[::-1], rows(*range(16))))
    assert contents(pool, range(16)) == want[::-1]


class NoAddresses:
    """A pool that tells no addresses at all."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        if name == "get_page_buffer_meta":
            raise AttributeError(name)
        return getattr(self._pool, name)


def test_a_pool_without_addresses_is_copied(stores: Stores) -> None:
    pool = NoAddresses(mha_pool())
    store = stores(storage_config(), pool)
    keys, want = hashes(2), contents(pool, [0, 1])
    before = page_bytes(pool, 8)
    store.batch_set_v1(keys, rows(0, 1))
    assert store.batch_get_v1([keys[1], *hashes(1)], rows(7, 8)) == [True, False]
    assert contents(pool, [7, 8]) == [want[1], before]


def test_a_pool_without_pages_is_refused(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    """As the pool of KV it stops the start; as a side pool it is left out."""

    class Nothing:
        page_size, size, layout = PAGE, 8 * PAGE, "odd"
        kv_buffer = torch.zeros(1)

        def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
            raise RuntimeError("not in this layout")

    with pytest.raises(ConfigError, match="SGLang's pool kv cannot be stored: Nothing in layout odd"):
        stores(storage_config(), Nothing())
    store = stores(storage_config(), mha_pool(), {"swa": Nothing()})
    assert "SGLang's pool swa cannot be stored" in caplog.text
    assert store.batch_set_v1(hashes(1), rows(0)) == [True]
