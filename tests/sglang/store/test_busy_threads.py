"""What the storage threads do while SGLang's scheduler, which shares their GIL, computes in Python."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import PAGE, hashes, mha_pool, rows, storage_config

PAGE_TOKENS = 64
PAGES = 8
NEVER_S = 1000.0
ROUNDS = 20
ATTEMPTS = 10
"""Nothing else may be busy in one of them."""
BEATS = 160
"""In so many calls another thread runs at least so often: twice what it does where it waits for locks only.

Where the GIL is free, three or four calls do; on a machine that is busy with other things, more.
"""


@pytest.fixture
def no_turns() -> Iterator[None]:
    """Threads get no turn but those that others give them: Python does not take the GIL away from one that runs."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(NEVER_S)
    yield
    sys.setswitchinterval(before)


def beats_during(call: Callable[[], object]) -> int:
    """How often another thread came to run, which asks for a turn again after each."""
    beats, ended, begun = 0, False, threading.Event()

    def beat() -> None:
        nonlocal beats
        while not ended:
            beats += 1
            begun.set()
            time.sleep(0)  # lets go of the GIL and asks for it again; nothing is waited for

    other = threading.Thread(target=beat)
    other.start()
    begun.wait()
    before = beats
    call()
    found = beats - before
    ended = True
    other.join()
    return found


@pytest.mark.usefixtures("no_turns")
def test_the_gil_is_free_while_bytes_move(stores: Stores) -> None:
    pool = mha_pool(pages=PAGES, page=PAGE_TOKENS, heads=16, head_dim=256)
    store = stores(storage_config(extra={"dram_capacity": "256MiB"}), pool)
    indices = rows(*range(PAGES * PAGE_TOKENS // PAGE))
    keys = hashes(PAGES)

    def is_free() -> bool:
        puts = gets = 0
        for _ in range(ROUNDS):
            store.clear()
            puts += beats_during(lambda: store.batch_set_v1(keys, indices))
            gets += beats_during(lambda: store.batch_get_v1(keys, indices))
            if min(puts, gets) >= BEATS:
                return True
        return False

    assert any(is_free() for _ in range(ATTEMPTS))
