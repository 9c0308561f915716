"""Slots through their public methods: every (state, event) pair, and the lives that engines really make."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbp_core.errors import IllegalTransition, StateError
from umbp_core.ops import Direction, OpStatus
from umbp_core.slots import Life, Slot, SlotTable, Transaction

#: How a fresh slot comes into each life.
PATHS: dict[Life, Callable[[Slot], None]] = {
    Life.INITIALIZED: lambda s: None,
    Life.ONBOARD_STAGED: lambda s: s.stage(32),
    Life.ONBOARDING: lambda s: (s.stage(32), s.begin_onboard("load")),  # type: ignore[func-returns-value]
    Life.PREFILLING: lambda s: s.scheduled(False),
    Life.SKIPPED_PREFILL: lambda s: (s.scheduled(False), s.skipped()),  # type: ignore[func-returns-value]
    Life.DECODING: lambda s: s.scheduled(True),
    Life.SKIPPED_DECODE: lambda s: (s.scheduled(True), s.skipped()),  # type: ignore[func-returns-value]
    Life.PREEMPTED: lambda s: (s.scheduled(False), s.preempted()),  # type: ignore[func-returns-value]
    Life.FINISHING: lambda s: (s.scheduled(False), s.begin_store("store"), s.finish()),  # type: ignore[func-returns-value]
    Life.FINISHED: lambda s: s.finish(),
}

EVENTS: dict[str, Callable[[Slot], None]] = {
    "stage": lambda s: s.stage(16),
    "unstage": lambda s: s.unstage(),
    "onboard": lambda s: s.begin_onboard("load-2"),
    "store": lambda s: s.begin_store("store-2"),
    "prefill": lambda s: s.scheduled(False),
    "decode": lambda s: s.scheduled(True),
    "skip": lambda s: s.skipped(),
    "preempt": lambda s: s.preempted(),
    "finish": lambda s: s.finish(),
}

# Written by hand, and not derived from the tables: what each event leads to, "-" where it is illegal.
LEGEND = {
    "-": None,
    "I": Life.INITIALIZED,
    "S": Life.ONBOARD_STAGED,
    "O": Life.ONBOARDING,
    "P": Life.PREFILLING,
    "p": Life.SKIPPED_PREFILL,
    "D": Life.DECODING,
    "d": Life.SKIPPED_DECODE,
    "X": Life.PREEMPTED,
    "F": Life.FINISHING,
    "E": Life.FINISHED,
}
MATRIX = {
    #                     stage unstage onboard store prefill decode skip preempt finish
    Life.INITIALIZED:     "S    -       -       -     P       D      -    -       E",
    Life.ONBOARD_STAGED:  "S    I       O       -     -       -      -    -       E",
    Life.ONBOARDING:      "-    -       O       -     -       -      -    -       F",
    Life.PREFILLING:      "-    -       -       P     P       D      p    X       E",
    Life.SKIPPED_PREFILL: "-    -       -       p     P       D      p    X       E",
    Life.DECODING:        "-    -       -       D     P       D      d    X       E",
    Life.SKIPPED_DECODE:  "-    -       -       d     P       D      d    X       E",
    Life.PREEMPTED:       "S    -       -       -     P       D      -    -       E",
    Life.FINISHING:       "-    -       -       -     -       -      -    -       F",
    Life.FINISHED:        "-    -       -       -     -       -      -    -       E",
}  # fmt: skip


def slot_in(life: Life) -> Slot:
    slot = SlotTable().create("request-7")
    PATHS[life](slot)
    assert slot.life is life
    return slot


def facts(slot: Slot) -> tuple[object, ...]:
    return (slot.life, slot.transaction, dict(slot.ops), slot.staged_tokens)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("life", Life)
@pytest.mark.statement("connector", 24)
def test_every_pair_of_life_and_event(life: Life, event: str) -> None:
    expected = LEGEND[MATRIX[life].split()[list(EVENTS).index(event)]]
    slot = slot_in(life)
    before = facts(slot)
    if expected is None:
        with pytest.raises(IllegalTransition, match="request-7"):
            EVENTS[event](slot)
        assert facts(slot) == before
    else:
        EVENTS[event](slot)
        assert slot.life is expected


@pytest.mark.parametrize("life", Life)
def test_what_may_begin_is_what_does_not_raise(life: Life) -> None:
    assert slot_in(life).may_match == (MATRIX[life].split()[0] != "-")
    assert slot_in(life).may_store == (MATRIX[life].split()[3] != "-")


def preempted_while_storing() -> Slot:
    """The only way to a load beside a store."""
    slot = slot_in(Life.PREFILLING)
    slot.begin_store("store")
    slot.preempted()
    return slot


def test_transactions_follow_the_ops() -> None:
    slot = preempted_while_storing()
    assert slot.transaction is Transaction.STORING
    slot.stage(16)
    slot.begin_onboard("load")
    assert slot.transaction is Transaction.LOADING_AND_STORING
    assert slot.ops == {"store": Direction.STORE, "load": Direction.LOAD}
    assert slot.op_ended("store", OpStatus.FAILED)
    assert slot.transaction is Transaction.LOADING
    assert slot.op_ended("load", OpStatus.DONE)
    assert (slot.transaction, slot.life, dict(slot.ops)) == (Transaction.NONE, Life.INITIALIZED, {})


def test_a_load_that_ends_before_the_stores_leaves_them_in_flight() -> None:
    slot = preempted_while_storing()
    slot.stage(16)
    slot.begin_onboard("load")
    slot.op_ended("load", OpStatus.DONE)
    assert (slot.transaction, slot.life) == (Transaction.STORING, Life.INITIALIZED)
    slot.scheduled(False)
    slot.begin_store("store-2")
    slot.op_ended("store", OpStatus.DONE)
    assert slot.transaction is Transaction.STORING
    slot.op_ended("store-2", OpStatus.DONE)
    assert slot.transaction is Transaction.NONE


@pytest.mark.statement("connector", 25)
def test_the_end_of_a_load_is_an_event_that_makes_the_slot_schedulable_again() -> None:
    slot = slot_in(Life.ONBOARDING)
    assert slot.staged_tokens == 32
    slot.op_ended("load", OpStatus.DONE)
    assert (slot.life, slot.staged_tokens) == (Life.INITIALIZED, 0)
    slot.scheduled(False)
    assert slot.life is Life.PREFILLING


def test_a_load_in_two_ops_ends_with_the_second() -> None:
    slot = slot_in(Life.ONBOARDING)
    slot.begin_onboard("from-ssd")
    slot.op_ended("load", OpStatus.DONE)
    assert slot.life is Life.ONBOARDING
    slot.op_ended("from-ssd", OpStatus.DONE)
    assert slot.life is Life.INITIALIZED


@pytest.mark.parametrize("status", [OpStatus.FAILED, OpStatus.CANCELLED, OpStatus.EXPIRED])
def test_a_failed_load_leaves_a_slot_that_can_be_recomputed(status: OpStatus) -> None:
    slot = slot_in(Life.ONBOARDING)
    slot.op_ended("load", status)
    assert (slot.life, slot.transaction) == (Life.INITIALIZED, Transaction.NONE)
    assert slot.may_match
    slot.scheduled(False)
    assert slot.may_store


def test_nothing_new_begins_until_the_ops_beside_a_failed_load_have_drained() -> None:
    slot = preempted_while_storing()
    slot.stage(16)
    slot.begin_onboard("load")
    slot.op_ended("load", OpStatus.FAILED)
    assert (slot.life, slot.transaction) == (Life.INITIALIZED, Transaction.FAILED)
    assert not slot.may_match
    with pytest.raises(IllegalTransition, match="FAILED"):
        slot.stage(16)
    slot.scheduled(False)
    before = facts(slot)
    assert not slot.may_store
    with pytest.raises(IllegalTransition, match="FAILED"):
        slot.begin_store("store-2")
    assert facts(slot) == before
    slot.op_ended("store", OpStatus.DONE)
    assert slot.transaction is Transaction.NONE
    slot.begin_store("store-2")


def test_a_failed_load_keeps_the_other_load_of_the_match_going() -> None:
    slot = slot_in(Life.ONBOARDING)
    slot.begin_onboard("from-ssd")
    slot.op_ended("load", OpStatus.FAILED)
    assert (slot.life, slot.transaction) == (Life.ONBOARDING, Transaction.FAILED)
    with pytest.raises(IllegalTransition):
        slot.begin_onboard("a-third")
    slot.op_ended("from-ssd", OpStatus.FAILED)
    assert (slot.life, slot.transaction) == (Life.INITIALIZED, Transaction.NONE)


def test_a_failed_store_does_not_stop_the_next_one() -> None:
    slot = slot_in(Life.DECODING)
    slot.begin_store("a")
    slot.begin_store("b")
    slot.op_ended("a", OpStatus.FAILED)
    assert (slot.transaction, slot.may_store) == (Transaction.STORING, True)


@pytest.mark.parametrize("life", [life for life in Life if life is not Life.FINISHED])
def test_finished_comes_after_the_last_op(life: Life) -> None:
    slot = slot_in(life)
    slot.finish()
    for op_id in tuple(slot.ops):
        assert slot.life is Life.FINISHING
        slot.op_ended(op_id, OpStatus.CANCELLED)
    assert slot.is_finished
    assert slot.staged_tokens == 0


def test_abort_with_loads_and_stores_in_flight_waits_for_both() -> None:
    slot = preempted_while_storing()
    slot.stage(16)
    slot.begin_onboard("load")
    slot.finish()
    slot.op_ended("load", OpStatus.FAILED)
    assert slot.life is Life.FINISHING
    slot.op_ended("store", OpStatus.DONE)
    assert slot.life is Life.FINISHED


def test_results_that_are_unknown_or_repeated_change_nothing() -> None:
    slot = slot_in(Life.PREFILLING)
    slot.begin_store("a")
    slot.begin_store("b")
    slot.finish()
    assert slot.op_ended("a", OpStatus.DONE)
    before = facts(slot)
    assert not slot.op_ended("a", OpStatus.DONE)
    assert not slot.op_ended("c", OpStatus.FAILED)
    assert facts(slot) == before
    assert slot.life is Life.FINISHING


def test_a_second_match_replaces_the_first() -> None:
    slot = slot_in(Life.ONBOARD_STAGED)
    slot.stage(16)
    assert slot.staged_tokens == 16


@pytest.mark.parametrize("n_tokens", [0, -16])
def test_a_match_of_nothing_is_not_staged(n_tokens: int) -> None:
    slot = slot_in(Life.INITIALIZED)
    with pytest.raises(StateError, match="request-7"):
        slot.stage(n_tokens)
    assert facts(slot) == facts(slot_in(Life.INITIALIZED))


def test_an_op_id_in_flight_is_not_used_twice() -> None:
    slot = slot_in(Life.PREFILLING)
    slot.begin_store("a")
    with pytest.raises(StateError, match="a is in flight"):
        slot.begin_store("a")
    assert dict(slot.ops) == {"a": Direction.STORE}


def test_ops_cannot_be_changed_from_outside() -> None:
    with pytest.raises(TypeError):
        slot_in(Life.ONBOARDING).ops["x"] = Direction.LOAD  # type: ignore[index]


def test_repr_names_request_and_states() -> None:
    assert repr(slot_in(Life.ONBOARDING)) == "Slot('request-7', ONBOARDING, LOADING, 1 ops)"


ENDS: dict[str, Callable[[Slot], object]] = {
    f"{op_id} {status.value}": lambda s, op_id=op_id, status=status: s.op_ended(op_id, status)  # type: ignore[misc]
    for op_id in ("load-2", "store-2")
    for status in (OpStatus.DONE, OpStatus.FAILED)
}
EVERYTHING: dict[str, Callable[[Slot], object]] = {**EVENTS, **ENDS}


def replayed(history: tuple[str, ...]) -> Slot:
    slot = SlotTable().create("request-7")
    for event in history:
        EVERYTHING[event](slot)
    return slot


def reachable() -> dict[tuple[object, ...], tuple[str, ...]]:
    """Every state that one load, one store and any other events lead to, with a shortest way there."""
    found: dict[tuple[object, ...], tuple[str, ...]] = {}
    todo: list[tuple[str, ...]] = [()]
    for history in todo:
        slot = replayed(history)
        key = (slot.life, slot.transaction, frozenset(slot.ops), slot.staged_tokens)
        if key not in found:
            found[key] = history
            todo += [(*history, name) for name, event in EVERYTHING.items() if taken(event, replayed(history))]
    return found


def taken(event: Callable[[Slot], object], slot: Slot) -> bool:
    """Whether the slot took the event; if not, nothing has changed."""
    before = facts(slot)
    try:
        event(slot)
    except StateError:
        assert facts(slot) == before
        return False
    return True


class TestEveryReachableState:
    """Both machines at once: the full product of what can be and what can happen."""

    @pytest.mark.statement("connector", 24)
    def test_an_event_is_taken_or_changes_nothing(self) -> None:
        states = reachable().values()
        outcomes = [taken(event, replayed(history)) for history in states for event in EVERYTHING.values()]
        assert len(states) > 20
        assert set(outcomes) == {True, False}

    def test_life_transaction_and_ops_agree(self) -> None:
        states = [replayed(history) for history in reachable().values()]
        assert {slot.life for slot in states} == set(Life)
        assert {slot.transaction for slot in states} == set(Transaction)
        for slot in states:
            loads = [op_id for op_id, direction in slot.ops.items() if direction is Direction.LOAD]
            assert (slot.life is Life.ONBOARDING) <= bool(loads)
            assert bool(loads) <= (slot.life in (Life.ONBOARDING, Life.FINISHING))
            assert (slot.transaction is Transaction.NONE) == (not slot.ops)
            assert (slot.life is Life.FINISHING) <= bool(slot.ops)
            assert (slot.life is Life.FINISHED) <= (not slot.ops)

    def test_every_state_can_be_ended(self) -> None:
        for history in reachable().values():
            slot = replayed(history)
            slot.finish()
            for op_id in tuple(slot.ops):
                slot.op_ended(op_id, OpStatus.CANCELLED)
            assert slot.is_finished


class TestTable:
    def test_slots_are_found_by_request(self) -> None:
        table = SlotTable()
        a, b = table.create("a"), table.create("b")
        assert (table.get("a"), table.get("b"), table.get("c")) == (a, b, None)
        assert list(table) == [a, b]
        assert "a" in table
        assert "c" not in table

    def test_a_request_has_one_slot(self) -> None:
        table = SlotTable()
        slot = table.create("a")
        with pytest.raises(StateError, match="request a has a slot"):
            table.create("a")
        assert table.get("a") is slot

    def test_a_request_without_an_id_has_none(self) -> None:
        with pytest.raises(StateError, match="empty"):
            SlotTable().create("")

    @pytest.mark.parametrize("life", [life for life in Life if life is not Life.FINISHED])
    def test_a_living_slot_is_not_removed(self, life: Life) -> None:
        table = SlotTable()
        slot = table.create("a")
        PATHS[life](slot)
        with pytest.raises(StateError, match=life.name):
            table.remove("a")
        assert table.get("a") is slot

    def test_nothing_is_left_of_requests_that_are_over(self) -> None:
        table = SlotTable()
        for number in range(10_000):
            slot = table.create(f"r{number}")
            slot.scheduled(False)
            slot.begin_store(f"op{number}")
            slot.finish()
            slot.op_ended(f"op{number}", OpStatus.DONE)
            table.remove(slot.request_id)
            table.remove(slot.request_id)
        assert len(table) == 0
