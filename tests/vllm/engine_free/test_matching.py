"""What a match promises, and what becomes of the promise (conformance statements 2-11, 14-17, 101)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import GroupSpec
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.ops import Direction
from umbp_core.slot_table import Life
from umbp_core.tiers import Tier

BLOCK = 4


@pytest.mark.parametrize("length", range(1, 22))
@pytest.mark.statement("connector", 2)
@pytest.mark.statement("connector", 6)
def test_hits_of_every_length(make_umbp: MakeUmbp, length: int) -> None:
    """Whole blocks only, and a prompt that ends on a block boundary computes just its last token again."""
    engine = make_umbp()
    engine.store(tokens(length))
    again = engine.add(tokens(length), max_tokens=3)
    engine.drain()
    assert engine.external_tokens(again) == length // BLOCK * BLOCK
    engine.close()


@pytest.mark.parametrize("local", range(0, 25, 4))
@pytest.mark.parametrize("extra", [0, 1, 4, 9])
@pytest.mark.statement("connector", 4)
def test_the_answer_counts_from_the_local_hit(make_umbp: MakeUmbp, local: int, extra: int) -> None:
    """vLLM holds ``local`` tokens itself, the pool 24; the pool adds exactly what is missing."""
    engine = make_umbp()
    engine.store(tokens(24))
    if local:
        engine.add(tokens(local) + [900, 901], max_tokens=1, skip_reading=True)
        engine.drain()
    again = engine.add(tokens(24 + extra), max_tokens=2)
    engine.drain()
    (first, *_) = engine.ledger.lives[again].matches
    hit = min(local, (24 + extra - 1) // BLOCK * BLOCK)
    assert first[:2] == (hit, 24 - hit)
    engine.close()


@pytest.mark.statement("connector", 4)
def test_a_gap_ends_the_match(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    engine.store(tokens(24))
    engine.pool.directory.drop(engine.keys(tokens(24))[0][3], Tier.DRAM)
    again = engine.add(tokens(24))
    engine.drain()
    assert engine.external_tokens(again) == 12
    engine.close()


@pytest.mark.statement("connector", 5)
@pytest.mark.statement("connector", 78)
def test_blocks_of_all_tiers_make_one_prefix(make_umbp: MakeUmbp, tmp_path: object) -> None:
    """Disk, memory, disk: one load brings them all (statement 5)."""
    engine = make_umbp({"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"})
    engine.store(tokens(24))
    assert all(engine.present(tokens(24), Tier.SSD))
    keys = engine.keys(tokens(24))[0]
    for block in (0, 1, 4):
        engine.pool.directory.drop(keys[block], Tier.DRAM)
    again = engine.add(tokens(30))
    engine.drain()
    assert engine.external_tokens(again) == 24
    assert engine.stat("hit_tokens", "ssd") == 12
    assert engine.stat("hit_tokens", "dram") == 12
    assert all(engine.present(tokens(24), Tier.DRAM))
    engine.close()


@pytest.mark.statement("connector", 11)
@pytest.mark.statement("connector", 12)
@pytest.mark.bug("B12")
@pytest.mark.statement("connector", 79)
def test_salt_and_adapter_are_part_of_the_key(make_umbp: MakeUmbp) -> None:
    """Statement 11: the same tokens under another salt, adapter or image are another prefix."""
    engine = make_umbp()
    prompt = tokens(24)
    kinds = [
        {},
        {"salt": "a"},
        {"salt": "b"},
        {"lora": "a"},
        {"lora": "b"},
        {"media": {0: ("cat", 6)}},
        {"media": {0: ("dog", 6)}},
    ]
    for kind in kinds:
        name = engine.add(prompt, max_tokens=1, **kind)
        engine.drain()
        assert engine.external_tokens(name) == 0
    engine.reset_prefix_cache()
    for kind in kinds:
        name = engine.add(prompt, max_tokens=1, **kind)
        engine.drain()
        assert engine.external_tokens(name) == 24
    engine.close()


@pytest.mark.statement("connector", 11)
def test_an_image_in_the_middle_shares_what_lies_before_it(make_umbp: MakeUmbp) -> None:
    engine = make_umbp()
    engine.add(tokens(24), max_tokens=1, media={10: ("cat", 6)})
    engine.drain()
    engine.reset_prefix_cache()
    name = engine.add(tokens(24), max_tokens=1, media={10: ("dog", 6)})
    engine.drain()
    assert engine.external_tokens(name) == 8
    engine.close()


def blocked_match(engine: UmbpHarness) -> str:
    """48 tokens are in the pool, the engine's blocks are taken: a request is matched and finds no room."""
    engine.store(tokens(48))
    engine.add(tokens(60, 500), max_tokens=3, request_id="blocker")
    engine.step()
    waiting = engine.add(tokens(50), max_tokens=2)
    engine.step()
    assert engine.ledger.lives[waiting].matches[-1][:2] == (0, 48)
    assert not engine.ledger.lives[waiting].loads
    return waiting


def pinned(engine: UmbpHarness) -> int:
    return engine.pool.directory.stats(Tier.DRAM).pinned


@pytest.mark.statement("connector", 7)
@pytest.mark.statement("connector", 101)
@pytest.mark.bug("B2")
def test_a_growing_local_hit_moves_the_match(make_umbp: MakeUmbp) -> None:
    """Statements 7 and 101: no room at the first match, a larger local hit at the second; every byte is right."""
    engine = make_umbp(num_blocks=25, max_model_len=64)
    waiting = blocked_match(engine)
    assert engine.stat("ops", "load", "done") == 0
    request = engine.scheduler.requests[waiting]
    engine.scheduler.waiting.remove_requests([request])
    grower = engine.add(tokens(26), max_tokens=1, skip_reading=True)
    engine.run_until_finished(grower, "blocker")
    engine.scheduler.waiting.add_request(request)
    engine.drain()
    assert engine.ledger.lives[waiting].matches[-1][:2] == (24, 24)
    assert engine.ledger.lives[waiting].loads == [24]
    engine.close()


@pytest.mark.statement("connector", 8)
def test_asking_again_pins_once(make_umbp: MakeUmbp) -> None:
    """Statement 8: many matches without an allocation hold each block once; the end of the request frees them."""
    engine = make_umbp(num_blocks=25, max_model_len=64)
    waiting = blocked_match(engine)
    once = pinned(engine)
    assert once == 12
    before = len(engine.ledger.lives[waiting].matches)
    engine.step()
    assert len(engine.ledger.lives[waiting].matches) > before
    assert pinned(engine) == once
    engine.abort(waiting)
    assert pinned(engine) == 0
    engine.close()


@pytest.mark.statement("connector", 10)
def test_a_match_that_nobody_follows_up_expires(make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement 10, with the leader's own clock."""
    engine = make_umbp(num_blocks=25, max_model_len=64)
    waiting = blocked_match(engine)
    request = engine.scheduler.requests[waiting]
    engine.scheduler.waiting.remove_requests([request])
    leader = engine.leader.leader
    clock = leader._clock
    monkeypatch.setattr(leader, "_clock", lambda: clock() + 3600)
    engine.step()
    assert pinned(engine) == 0
    engine.scheduler.waiting.add_request(request)
    engine.drain()
    assert engine.external_tokens(waiting) == 48
    engine.close()


@pytest.mark.statement("connector", 9)
def test_a_promise_survives_pressure(make_umbp: MakeUmbp) -> None:
    """Statement 9: between match and load the tier is filled with other traffic."""
    engine = make_umbp({"dram_capacity": "80KiB"}, num_blocks=40, max_model_len=64)
    engine.store(tokens(48))
    engine.hold(Direction.LOAD)
    loading = engine.add(tokens(50))
    engine.step()
    for first in (100, 200, 300, 400):
        engine.add(tokens(24, first), max_tokens=1)
        for _ in range(4):
            engine.step()
            engine.yield_to_transfers()
    assert all(engine.present(tokens(48)))
    engine.release(Direction.LOAD)
    engine.drain()
    assert engine.external_tokens(loading) == 48
    assert engine.stat("ops", "load", "done") == 1
    engine.close()


@pytest.mark.statement("connector", 9)
def test_a_match_that_waits_for_its_allocation_survives_pressure(
    make_umbp: MakeUmbp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same before the load: matched, no block of HBM yet, and more is stored than the tier has room for."""
    engine = make_umbp({"dram_capacity": "112KiB"}, num_blocks=25, max_model_len=64)
    now = engine.leader.leader._clock()
    monkeypatch.setattr(engine.leader.leader, "_clock", lambda: now)
    waiting = blocked_match(engine)
    request = engine.scheduler.requests[waiting]
    engine.scheduler.waiting.remove_requests([request])
    engine.run_until_finished("blocker")
    for first in (100, 200, 300, 400):
        engine.run_until_finished(engine.add(tokens(24, first), max_tokens=1))
        engine.step_until(lambda: engine.workers[0].engine.pending() == 0)
    assert engine.stat("evicted_blocks", "dram") > 0
    assert engine.leader.leader._requests[waiting].slot.life is Life.ONBOARD_STAGED
    assert all(engine.present(tokens(48)))
    engine.scheduler.waiting.add_request(request)
    engine.drain()
    assert engine.ledger.lives[waiting].loads == [48]
    assert engine.stat("ops", "load", "done") == 1
    engine.close()


@pytest.mark.statement("connector", 15)
def test_zero_external_tokens_load_nothing(make_umbp: MakeUmbp) -> None:
    """Statement 15: the promise is made but the user does not read caches; pins are given back."""
    engine = make_umbp()
    engine.store(tokens(24))
    name = engine.add(tokens(24), skip_reading=True)
    engine.drain()
    assert engine.external_tokens(name) == 0
    assert engine.stat("ops", "load", "done") == 0
    engine.close()


def take_less(engine: UmbpHarness, most: int) -> None:
    """From now on the scheduler takes ``most`` of the tokens that a match promises, where it promises more."""
    matched = engine.leader.get_num_new_matched_tokens

    def get_num_new_matched_tokens(request: Any, computed: int) -> tuple[int | None, bool]:
        count, later = matched(request, computed)
        return count if count is None else min(most, count), later

    engine.leader.get_num_new_matched_tokens = get_num_new_matched_tokens


@pytest.mark.statement("connector", 16)
@pytest.mark.parametrize("mode", ["async", "layerwise"])
@pytest.mark.parametrize("taken", [1, 3, 4, 12, 13, 23])
def test_less_than_promised_is_honoured(make_umbp: MakeUmbp, taken: int, mode: str) -> None:
    """The scheduler takes some of 24 tokens; of a block that is taken in part, those tokens count that vLLM counts."""
    engine = make_umbp({"load_mode": mode})
    engine.store(tokens(24))
    take_less(engine, taken)
    name = engine.add(tokens(24) + [900], max_tokens=6)
    engine.drain()
    assert engine.external_tokens(name) == taken
    assert engine.stat("hit_tokens", "dram") == taken
    assert engine.stat("loaded_blocks", "dram") == -(-taken // BLOCK)
    assert engine.check_stored() >= 6
    engine.close()


@pytest.mark.statement("connector", 16)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("taken", range(1, 24))
def test_less_than_promised_in_a_window_is_loaded_or_computed(make_umbp: MakeUmbp, taken: int, alone: bool) -> None:
    """What was staged is the window of the promised end: where the window of another one begins earlier, all fails."""
    window = GroupSpec("window", window=10)
    engine = make_umbp(groups=(window,) if alone else (GroupSpec("full"), window))
    engine.store(tokens(24))
    take_less(engine, taken)
    name = engine.add(tokens(24) + [900], max_tokens=6)
    engine.expects_internal_failures = True
    engine.drain()
    staged = taken > 20
    assert (engine.stat("ops", "load", "done") == 1) == staged
    assert engine.internal_failures() == ({} if staged else {"update_state_after_alloc": 1})
    assert engine.finish_reasons[name] == "length"
    assert pinned(engine) == 0
    again = engine.add(tokens(24) + [901])
    engine.drain()
    assert engine.finish_reasons[again] == "length"
    assert engine.check_stored()
    engine.close()


@pytest.mark.statement("connector", 16)
def test_more_than_promised_is_refused_and_recomputed(make_umbp: MakeUmbp) -> None:
    """Statement 16: a load that was never promised ends as a failed one, not in an exception or a hang."""
    engine = make_umbp()
    engine.store(tokens(24))
    matched = engine.leader.get_num_new_matched_tokens
    too_many = [4]

    def get_num_new_matched_tokens(request: Any, computed: int) -> tuple[int, bool]:
        count = matched(request, computed)[0] + (too_many.pop() if too_many else 0)
        return count, count > 0

    engine.leader.get_num_new_matched_tokens = get_num_new_matched_tokens
    name = engine.add(tokens(32))
    engine.expects_internal_failures = True
    engine.drain()
    assert engine.finish_reasons[name] == "length"
    assert engine.internal_failures() == {"update_state_after_alloc": 1}
    engine.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2), st.integers(1, 30)), min_size=2, max_size=6))
@pytest.mark.statement("connector", 17)
@pytest.mark.bug("B3")
def test_positions_of_growing_requests(turns: list[tuple[int, int, int]]) -> None:
    """Statement 17: conversations whose turns grow, each turn loading what earlier ones left (bug B3)."""
    with UmbpHarness(num_blocks=120, max_model_len=128) as engine:
        history: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for length, conversation, max_tokens in turns:
            prompt = (history[conversation] + tokens(length, 300 * conversation))[:90]
            name = engine.add(prompt, max_tokens=max_tokens)
            engine.drain()
            history[conversation] = prompt + engine.tokens[name]
            engine.reset_prefix_cache()
        engine.check_stored()


def test_a_window_needs_only_its_own_blocks(make_umbp: MakeUmbp) -> None:
    """With a sliding window of 10 tokens the blocks before it may be missing in that group."""
    engine = make_umbp(groups=(GroupSpec("full"), GroupSpec("window", window=10)))
    engine.store(tokens(40))
    full, window = engine.keys(tokens(40))
    for key in window[:7]:
        engine.pool.directory.drop(key, Tier.DRAM)
    again = engine.add(tokens(42))
    engine.drain()
    assert engine.external_tokens(again) == 40
    engine.reset_prefix_cache()
    engine.pool.directory.drop(window[8], Tier.DRAM)
    once_more = engine.add(tokens(42), max_tokens=1)
    engine.drain()
    assert engine.external_tokens(once_more) < 40
    engine.close()
    assert full


@pytest.mark.parametrize("kind", ["window", "chunk"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_whole_prompt_hit_in_windows(make_umbp: MakeUmbp, kind: str, alone: bool) -> None:
    """The last token is computed again, and its window reaches one token further back than that of the next one."""
    for size in range(4, 18, 4 if kind == "chunk" else 1):
        groups = (GroupSpec(kind, window=size),) if alone else (GroupSpec("full"), GroupSpec(kind, window=size))
        engine = make_umbp(groups=groups)
        engine.store(tokens(40))
        for length in (32, 33, 36, 40):
            again = engine.add(tokens(length), max_tokens=2)
            engine.drain()
            local, external, _ = engine.ledger.lives[again].matches[0]
            # A model of chunks alone computes, and therefore stores, no more than the last chunk of a cold prompt.
            assert (kind, alone) == ("chunk", True) or local + external >= (length - 1) // BLOCK * BLOCK
            engine.reset_prefix_cache()
        engine.close()
