"""What the leader does about one request: arrival, asking again, what is stored when, and what is counted."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.errors import StateError
from umbp_core.ops import Direction
from umbp_core.slot_table import Life
from umbp_core.tiers import Tier

BLOCK = 4


def stored_positions(engine: UmbpHarness, prompt: list[int]) -> list[list[int]]:
    """From now on: for every store op, which blocks of ``prompt`` it carries."""
    index = {key: block for block, key in enumerate(engine.keys(prompt)[0])}
    found: list[list[int]] = []
    submit = engine.workers[0].engine.submit

    def noted(ops: Any, *arguments: Any, **more: Any) -> None:
        ops = list(ops)
        found.extend([index[b.key] for b in op.blocks] for op in ops if op.direction is Direction.STORE)
        submit(ops, *arguments, **more)

    engine.workers[0].engine.submit = noted  # type: ignore[method-assign]
    return found


@pytest.mark.statement("connector", 1)
def test_a_request_without_tokens_is_refused_with_our_own_error(make_umbp: MakeUmbp) -> None:
    """At the door inside: a typed error and no slot.  At vLLM's: counted, and the engine goes on."""
    engine = make_umbp()
    empty = SimpleNamespace(request_id="empty", num_tokens=0, block_hashes=[], skip_reading_prefix_cache=False)
    with pytest.raises(StateError, match="request empty has no tokens"):
        engine.leader.leader.on_new_request(empty)
    assert engine.leader.leader.live_requests == 0
    engine.leader.on_new_request(empty)
    assert engine.stat("degraded", "internal_on_new_request") == 1
    assert engine.leader.leader.match(empty, 0) == (0, False)
    engine.expects_internal_failures = True
    name = engine.add(tokens(24))
    engine.drain()
    assert engine.finish_reasons[name] == "length"
    engine.close()


@pytest.mark.statement("connector", 3)
@pytest.mark.parametrize("length", range(1, 10))
def test_less_than_a_block_beyond_what_is_computed_is_no_match(make_umbp: MakeUmbp, length: int) -> None:
    engine = make_umbp()
    engine.store(tokens(12))
    request = engine.scheduler.requests[engine.add(tokens(length))]
    for computed in range(0, length, BLOCK):
        answer = engine.leader.get_num_new_matched_tokens(request, computed)
        assert answer == ((0, False) if length - computed < BLOCK else ((length - computed) // BLOCK * BLOCK, True))
    engine.drain()
    engine.close()


@pytest.mark.statement("connector", 14)
def test_a_running_request_is_not_matched_again(make_umbp: MakeUmbp) -> None:
    """Asked directly, as vLLM itself never does: prefilling, between two steps, and decoding."""
    engine = make_umbp(max_num_batched_tokens=8, max_num_seqs=4)
    engine.store(tokens(24))
    running = engine.add(tokens(40, 500), max_tokens=8)
    request = engine.scheduler.requests[running]
    lives = set()
    while not engine.tokens.get(running) or len(engine.tokens[running]) < 4:
        engine.step()
        slot = engine.leader.leader._requests[running].slot
        lives.add(slot.life)
        state = slot.life, slot.transaction
        assert engine.leader.leader.match(request, 0) == (0, False)
        assert (slot.life, slot.transaction) == state, "asking has changed nothing"
    assert lives == {Life.PREFILLING, Life.DECODING}
    engine.drain()
    engine.close()


@pytest.mark.statement("connector", 18)
@pytest.mark.bug("B16")
def test_a_block_list_that_cannot_be_right_costs_one_request_its_load(make_umbp: MakeUmbp) -> None:
    """The list is the whole truth about positions; one that ends before the promised blocks is not guessed at."""
    engine = make_umbp()
    engine.store(tokens(24))
    allocated = engine.leader.update_state_after_alloc
    short = ["once"]

    def update_state_after_alloc(request: Any, blocks: Any, count: int) -> None:
        if count and short and short.pop():
            ids = blocks.get_block_ids()
            blocks = SimpleNamespace(get_block_ids=lambda: tuple(group[:-2] for group in ids))
        allocated(request, blocks, count)

    engine.leader.update_state_after_alloc = update_state_after_alloc
    engine.expects_internal_failures = True
    degraded, other = engine.add(tokens(24)), engine.add(tokens(24) + [900])
    engine.drain()
    assert engine.internal_failures() == {"update_state_after_alloc": 1}
    assert engine.stat("degraded", "internal_update_state_after_alloc") == 1
    assert [engine.finish_reasons[name] for name in (degraded, other)] == ["length", "length"]
    again = engine.add(tokens(24) + [901])
    engine.reset_prefix_cache()
    engine.drain()
    assert engine.external_tokens(again) == 24, "the next request is served as ever"
    engine.check_stored()
    engine.close()


@pytest.mark.statement("connector", 20)
@pytest.mark.parametrize("chunk", [4, 6, 8, 16])
def test_every_block_of_a_chunked_prefill_is_decided_once(make_umbp: MakeUmbp, chunk: int) -> None:
    """With chunks of two blocks, blocks 0 and 1 go first, then 2 and 3; with odd ones as they get full."""
    prompt = tokens(40)
    engine = make_umbp(max_num_batched_tokens=chunk, max_num_seqs=4)
    found = stored_positions(engine, prompt)
    engine.add(prompt, max_tokens=1)
    engine.drain()
    ends = [min(end, 40) // BLOCK for end in range(0, 40 + chunk, chunk)]
    assert found == [list(range(first, end)) for first, end in itertools.pairwise(ends) if first != end]
    engine.close()


@pytest.mark.statement("connector", 19)
def test_vllms_own_hits_are_not_stored_again(make_umbp: MakeUmbp) -> None:
    """Here the pool has it already; only what the request computes is stored."""
    prompt = tokens(40)
    engine = make_umbp()
    engine.add(prompt[:24], max_tokens=1)
    engine.drain()
    found = stored_positions(engine, prompt)
    engine.add(prompt, max_tokens=1)
    engine.drain()
    assert found == [[6, 7, 8, 9]]
    engine.close()


@pytest.mark.statement("connector", 19)
@pytest.mark.parametrize("lost", [range(6), range(2, 4)])
def test_what_the_pool_gave_up_is_stored_again_from_hbm(make_umbp: MakeUmbp, lost: range) -> None:
    """The engine holds a prefix of which the pool has lost blocks: the next request that uses it brings them back."""
    prompt = tokens(40)
    engine = make_umbp()
    engine.add(prompt[:24], max_tokens=1)
    engine.drain()
    for block in lost:
        engine.pool.directory.drop(engine.keys(prompt)[0][block], Tier.DRAM)
    found = stored_positions(engine, prompt)
    again = engine.add(prompt, max_tokens=1)
    engine.drain()
    assert engine.ledger.lives[again].matches[0][0] == 24, "vLLM has them itself"
    assert found == [[*lost, 6, 7, 8, 9]]
    assert all(engine.present(prompt))
    assert engine.check_stored() >= 10
    engine.close()


@pytest.mark.statement("connector", 23)
@pytest.mark.bug("B11")
@pytest.mark.parametrize("decode_blocks", [False, True])
def test_blocks_that_fill_up_while_decoding_are_stored_if_wanted(make_umbp: MakeUmbp, decode_blocks: bool) -> None:
    """vLLM sends no new token ids to a connector's scheduler half; the blocks' hashes are what counts."""
    engine = make_umbp({"store_decode_blocks": decode_blocks})
    name = engine.add(tokens(10), max_tokens=12)
    engine.drain()
    said = tokens(10) + engine.tokens[name]
    assert engine.present(said[:20]) == [True, True, *[decode_blocks] * 3]
    engine.check_stored()
    engine.close()


@pytest.mark.statement("connector", 27)
def test_a_lookup_is_counted_once_however_often_it_is_asked(make_umbp: MakeUmbp) -> None:
    """A request that finds no room is asked about in every step, and must not drown those that are served."""
    engine = make_umbp(num_blocks=25, max_model_len=64)
    engine.store(tokens(48))
    blocker = engine.add(tokens(60, 500), max_tokens=3)
    engine.step()
    before = engine.stat("lookups"), engine.stat("lookup_tokens")
    missing = engine.add(tokens(50, 300), max_tokens=2)
    for _ in range(2):
        engine.step()
    assert len(engine.ledger.lives[missing].matches) > 1
    assert (engine.stat("lookups"), engine.stat("lookup_tokens")) == (before[0] + 1, before[1] + 50)
    engine.run_until_finished(blocker, missing)
    assert engine.stat("lookups") == before[0] + 1
    engine.drain()
    engine.close()


@pytest.mark.statement("connector", 27)
def test_what_cannot_be_hit_is_no_lookup(make_umbp: MakeUmbp) -> None:
    """Fewer tokens than a block beyond what vLLM holds: neither a lookup nor part of any hit rate."""
    engine = make_umbp()
    engine.store(tokens(24))
    before = engine.stat("lookups"), engine.stat("lookup_tokens")
    engine.add(tokens(3, 700), max_tokens=1)
    engine.drain()
    assert (engine.stat("lookups"), engine.stat("lookup_tokens")) == before
    served = engine.add(tokens(26), max_tokens=1)
    engine.drain()
    assert engine.external_tokens(served) == 24
    assert (engine.stat("lookups"), engine.stat("lookup_tokens")) == (before[0] + 1, before[1] + 26)
    assert engine.stat("hit_tokens", "dram") == 24
    assert engine.pool.directory.stats(Tier.DRAM).pinned == 0
    engine.close()
