"""The tables themselves: complete, closed, and without a state that cannot be left."""

from __future__ import annotations

import pytest

from umbp_core.slot_table import (
    JOINT,
    LIFE,
    TRANSACTION,
    Life,
    LifeEvent,
    Step,
    Transaction,
    TransactionEvent,
    states_that_allow,
)


def test_every_state_is_in_its_table() -> None:
    assert set(LIFE) == set(Life)
    assert set(TRANSACTION) == set(Transaction)


def test_tables_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError):
        LIFE[Life.FINISHED] = {}  # type: ignore[index]


def test_every_event_is_used() -> None:
    assert {event for row in LIFE.values() for event in row} == set(LifeEvent)
    assert {event for row in TRANSACTION.values() for event in row} == set(TransactionEvent)


def reachable(start: Life) -> set[Life]:
    seen: set[Life] = set()
    todo = [start]
    while todo:
        life = todo.pop()
        if life not in seen:
            seen.add(life)
            todo += LIFE[life].values()
            todo += [target for (source, _), target in JOINT.items() if source is life]
    return seen


def test_every_life_is_reachable_from_the_first_and_reaches_the_last() -> None:
    assert reachable(Life.INITIALIZED) == set(Life)
    assert all(Life.FINISHED in reachable(life) for life in Life)
    assert reachable(Life.FINISHED) == {Life.FINISHED}


def test_a_request_may_be_aborted_in_every_life() -> None:
    assert all(LifeEvent.FINISH in row for row in LIFE.values())


@pytest.mark.statement("connector", 24)
def test_nothing_is_stored_or_scheduled_while_a_match_is_held_or_loaded() -> None:
    for life in (Life.ONBOARD_STAGED, Life.ONBOARDING, Life.FINISHING, Life.FINISHED):
        assert LIFE[life].keys().isdisjoint({LifeEvent.BEGIN_STORE, LifeEvent.PREFILL, LifeEvent.DECODE})


@pytest.mark.statement("connector", 24)
def test_loads_begin_from_a_staged_match_only() -> None:
    assert {life for life in Life if LifeEvent.BEGIN_ONBOARD in LIFE[life]} == {Life.ONBOARD_STAGED, Life.ONBOARDING}
    origins = {life for life in Life if LIFE[life].get(LifeEvent.STAGE) is Life.ONBOARD_STAGED}
    assert origins == {Life.INITIALIZED, Life.PREEMPTED, Life.ONBOARD_STAGED}


def test_nothing_begins_while_a_failure_drains() -> None:
    assert (
        TRANSACTION[Transaction.FAILED].keys().isdisjoint({TransactionEvent.LOAD_BEGUN, TransactionEvent.STORE_BEGUN})
    )


# Written by hand, and not derived from the tables: what each event leads to, "-" where it is illegal.
TRANSACTION_MATRIX = {
    #                                LOAD_BEGUN STORE_BEGUN LOAD_FAILED LOADS_ENDED STORES_ENDED RELEASED
    Transaction.NONE:                "L         S           -           -           -            N",
    Transaction.LOADING:             "L         -           F           N           -            -",
    Transaction.STORING:             "B         S           -           -           N            -",
    Transaction.LOADING_AND_STORING: "B         -           F           S           L            -",
    Transaction.FAILED:              "-         -           F           F           F            N",
}  # fmt: skip
LETTERS = {
    "-": None,
    "N": Transaction.NONE,
    "L": Transaction.LOADING,
    "S": Transaction.STORING,
    "B": Transaction.LOADING_AND_STORING,
    "F": Transaction.FAILED,
}


@pytest.mark.statement("connector", 24)
@pytest.mark.parametrize("transaction", Transaction)
def test_every_pair_of_transaction_and_event(transaction: Transaction) -> None:
    wanted = [LETTERS[letter] for letter in TRANSACTION_MATRIX[transaction].split()]
    assert [TRANSACTION[transaction].get(event) for event in TransactionEvent] == wanted


def test_joint_rules_end() -> None:
    for (life, transaction), target in JOINT.items():
        assert (target, transaction) not in JOINT, f"{life.name} would go on from {target.name} for ever"


def test_a_step_moves_both_machines_or_none() -> None:
    store = Step.of(LifeEvent.BEGIN_STORE, TransactionEvent.STORE_BEGUN)
    assert store.after[Life.DECODING, Transaction.NONE] == (Life.DECODING, Transaction.STORING)
    assert (Life.INITIALIZED, Transaction.NONE) not in store.after
    assert (Life.DECODING, Transaction.FAILED) not in store.after
    assert states_that_allow(LifeEvent.BEGIN_STORE, TransactionEvent.STORE_BEGUN) == store.after.keys()


def test_a_step_names_the_machine_that_refuses_it() -> None:
    store = Step.of(LifeEvent.BEGIN_STORE, TransactionEvent.STORE_BEGUN)
    assert store.refusal((Life.INITIALIZED, Transaction.FAILED)) == ("life", "INITIALIZED", "BEGIN_STORE")
    assert store.refusal((Life.DECODING, Transaction.FAILED)) == ("transaction", "FAILED", "STORE_BEGUN")


def test_the_last_release_ends_a_request_that_is_over() -> None:
    ended = Step.of(transfer=TransactionEvent.STORES_ENDED)
    assert ended.after[Life.FINISHING, Transaction.STORING] == (Life.FINISHED, Transaction.NONE)
    assert ended.after[Life.DECODING, Transaction.STORING] == (Life.DECODING, Transaction.NONE)
