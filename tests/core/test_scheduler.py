"""The transfer scheduler: rendezvous, tokens, commitment, deadlines, results (laws L3, L4, L11)."""

from __future__ import annotations

import random
import tracemalloc

import msgspec
import pytest

from umbp_core.errors import ConfigError, StateError
from umbp_core.ops import (
    BlockCopy,
    Direction,
    ImmediateTransferResult,
    LeaderTransferRequest,
    OpResult,
    OpStatus,
    Requirement,
    RequirementKind,
    TransferScheduleRequest,
    WorkerTransferRequest,
)
from umbp_core.scheduler import Fate, Limits, TransferScheduler

NONE = Requirement()


def leader(
    op_id: str,
    direction: Direction = Direction.STORE,
    requirement: Requirement = NONE,
    request_id: str = "request",
    immediate: bool = False,
    timeout_s: float = 30.0,
    blocks: int = 2,
) -> LeaderTransferRequest:
    copies = tuple(BlockCopy(b"%d" % n, 0, n, n) for n in range(blocks))
    return LeaderTransferRequest(op_id, request_id, direction, copies, requirement, immediate, timeout_s)


def half_of(op: LeaderTransferRequest) -> WorkerTransferRequest:
    return WorkerTransferRequest(op.op_id, op.request_id, op.direction)


def done(op: LeaderTransferRequest) -> OpResult:
    return OpResult(op.op_id, op.request_id, op.direction, OpStatus.DONE, checksums=b"sum", moved_bytes=7)


def pair(scheduler: TransferScheduler, *ops: LeaderTransferRequest, now: float = 0.0) -> None:
    for op in ops:
        scheduler.submit(op, now)
        scheduler.enqueue(half_of(op), now)


def execute(scheduler: TransferScheduler, now: float = 0.0) -> list[str]:
    """Start everything that may start and let it succeed; returns the op ids in the order of their starts."""
    order = []
    while started := scheduler.poll(now):
        for op in started:
            order.append(op.op_id)
            assert scheduler.commit(op.op_id)
            assert scheduler.finished(done(op), now)
    return order


def statuses(scheduler: TransferScheduler) -> dict[str, OpStatus]:
    results = scheduler.take_results()
    assert len({result.op_id for result in results}) == len(results), "an op was reported twice"
    return {result.op_id: result.status for result in results}


class TestRendezvous:
    @pytest.mark.statement("connector", 35)
    @pytest.mark.parametrize("worker_first", [False, True])
    def test_the_second_half_releases_the_op(self, worker_first: bool) -> None:
        scheduler, op = TransferScheduler(), leader("a")
        halves = [lambda: scheduler.submit(op, 0.0), lambda: scheduler.enqueue(half_of(op), 0.0)]
        first, second = reversed(halves) if worker_first else halves
        first()
        assert scheduler.poll(0.0) == []
        second()
        assert scheduler.poll(0.0) == [op]
        assert scheduler.poll(0.0) == []

    @pytest.mark.statement("connector", 36)
    def test_an_immediate_op_needs_no_partner_and_minds_none(self) -> None:
        scheduler, op = TransferScheduler(), leader("a", immediate=True)
        scheduler.submit(op, 0.0)
        assert scheduler.poll(0.0) == [op]
        scheduler.enqueue(half_of(op), 0.0)
        assert scheduler.poll(0.0) == []
        scheduler.commit("a")
        scheduler.finished(done(op), 0.0)
        scheduler.enqueue(half_of(op), 0.0)
        assert (scheduler.pending(), statuses(scheduler)) == (0, {"a": OpStatus.DONE})

    def test_a_worker_half_that_comes_first_is_enough_for_an_immediate_op(self) -> None:
        scheduler, op = TransferScheduler(), leader("a", immediate=True)
        scheduler.enqueue(half_of(op), 0.0)
        scheduler.submit(op, 0.0)
        assert scheduler.poll(0.0) == [op]

    @pytest.mark.statement("connector", 39)
    def test_the_same_half_twice_is_one(self) -> None:
        scheduler, op = TransferScheduler(), leader("a")
        for _ in range(2):
            scheduler.enqueue(half_of(op), 0.0)
        for _ in range(2):
            scheduler.submit(op, 0.0)
        assert execute(scheduler) == ["a"]
        pair(scheduler, op)
        assert (execute(scheduler), scheduler.pending(), statuses(scheduler)) == ([], 0, {"a": OpStatus.DONE})

    @pytest.mark.parametrize(
        "other",
        [
            leader("a", request_id="another"),
            leader("a", Direction.LOAD),
            leader("a", blocks=1),
            leader("a", timeout_s=1.0),
        ],
    )
    def test_a_half_that_contradicts_is_refused_and_changes_nothing(self, other: LeaderTransferRequest) -> None:
        scheduler, op = TransferScheduler(), leader("a")
        scheduler.submit(op, 0.0)
        before = scheduler.dump()
        with pytest.raises(StateError, match="op a"):
            scheduler.submit(other, 0.0)
        if half_of(other) != half_of(op):
            with pytest.raises(StateError, match="op a"):
                scheduler.enqueue(half_of(other), 0.0)
        assert scheduler.dump() == before
        scheduler.enqueue(half_of(op), 0.0)
        assert scheduler.poll(0.0) == [op]

    @pytest.mark.statement("connector", 36)
    @pytest.mark.parametrize("first", ["result", "worker half", "leader half"])
    def test_an_immediate_op_that_was_carried_out_elsewhere_counts_once(self, first: str) -> None:
        scheduler, op = TransferScheduler(), leader("a", Direction.LOAD)
        result = ImmediateTransferResult("a", "request", Direction.LOAD, OpStatus.DONE)
        before = {"result": None, "worker half": half_of(op), "leader half": TransferScheduleRequest(op)}[first]
        if before is not None:
            scheduler.take(before, 0.0)
        for _ in range(3):
            scheduler.take(result, 0.0)
        scheduler.take(half_of(op), 0.0)
        scheduler.take(TransferScheduleRequest(op), 0.0)
        assert (scheduler.poll(0.0), scheduler.pending(), statuses(scheduler)) == ([], 0, {"a": OpStatus.DONE})

    def test_a_result_from_elsewhere_does_not_end_what_runs_here(self) -> None:
        scheduler, op = TransferScheduler(), leader("a", immediate=True)
        scheduler.submit(op, 0.0)
        assert scheduler.poll(0.0) == [op]
        scheduler.take(ImmediateTransferResult("a", "request", Direction.STORE, OpStatus.FAILED), 0.0)
        assert scheduler.take_results() == []
        with pytest.raises(StateError, match="op a"):
            scheduler.take(ImmediateTransferResult("a", "another", Direction.STORE, OpStatus.DONE), 0.0)

    @pytest.mark.statement("connector", 35)
    @pytest.mark.parametrize("hundred", range(10))
    def test_any_interleaving_of_halves_and_progress_runs_every_op_once(self, hundred: int) -> None:
        for seed in range(100 * hundred, 100 * (hundred + 1)):
            ran, ended, pending = self.interleave(random.Random(seed))
            assert sorted(ran) == sorted(ended), f"seed {seed}"
            assert (set(ended.values()), len(ended), pending) == ({OpStatus.DONE}, 20, 0), f"seed {seed}"

    @staticmethod
    def interleave(rng: random.Random) -> tuple[list[str], dict[str, OpStatus], int]:
        """Twenty ops; both halves of each, some again, and four steps, in an order of the generator's.

        Which ops ran, how they ended, and how many are left.
        """
        scheduler = TransferScheduler()
        kinds = list(RequirementKind)
        ops = [
            leader(f"op{n}", rng.choice(list(Direction)), Requirement(rng.choice(kinds), rng.randrange(4), "l", 0))
            for n in range(20)
        ]
        events = [lambda op=op: scheduler.submit(op, 0.0) for op in ops]
        events += [lambda op=op: scheduler.enqueue(half_of(op), 0.0) for op in ops]
        events += rng.sample(events, 10)
        rng.shuffle(events)
        iteration_ends = sorted(rng.sample(range(len(events)), 4))
        ran: list[str] = []
        for number, event in enumerate(events):
            event()
            for n, place in enumerate(iteration_ends):
                if number == place:
                    scheduler.begin_iteration(n)
                    scheduler.layer_done("l", 0)
                    scheduler.end_iteration(n)
            ran += execute(scheduler)
        return ran, statuses(scheduler), scheduler.pending()


class TestRequirements:
    def test_a_store_starts_after_its_iteration(self) -> None:
        scheduler = TransferScheduler()
        pair(scheduler, leader("a", requirement=Requirement(RequirementKind.ITERATION_COMPLETE, 5)))
        scheduler.begin_iteration(5)
        assert scheduler.poll(0.0) == []
        scheduler.end_iteration(5)
        assert execute(scheduler) == ["a"]

    def test_a_store_starts_after_its_layer(self) -> None:
        scheduler = TransferScheduler()
        scheduler.begin_iteration(5)
        pair(
            scheduler,
            leader("by-name", requirement=Requirement(RequirementKind.LAYER_NAME_COMPLETE, 5, "model.1")),
            leader("by-index", requirement=Requirement(RequirementKind.LAYER_COMPLETE, 5, "", 2)),
        )
        scheduler.layer_done("model.0", 0)
        assert scheduler.poll(0.0) == []
        scheduler.layer_done("model.1", 1)
        assert execute(scheduler) == ["by-name"]
        scheduler.layer_done("model.2", 2)
        assert execute(scheduler) == ["by-index"]

    def test_an_immediate_op_waits_for_its_requirement_too(self) -> None:
        scheduler = TransferScheduler()
        requirement = Requirement(RequirementKind.ITERATION_COMPLETE, 1)
        scheduler.submit(leader("a", requirement=requirement, immediate=True), 0.0)
        assert scheduler.poll(0.0) == []
        scheduler.end_iteration(1)
        assert execute(scheduler) == ["a"]


class TestTokens:
    @pytest.mark.statement("connector", 45)
    def test_loads_then_stores_then_demotions_each_in_order(self) -> None:
        scheduler = TransferScheduler(Limits(loads=2, stores=2, demotions=1, blocks=1))
        pair(scheduler, *[leader(f"demote{n}", Direction.DEMOTE) for n in range(3)])
        pair(scheduler, *[leader(f"store{n}", Direction.STORE) for n in range(3)])
        pair(scheduler, *[leader(f"load{n}", Direction.LOAD) for n in range(3)])
        started = [op.op_id for op in scheduler.poll(0.0)]
        assert started == ["load0", "load1", "store0", "store1", "demote0"]

    def test_an_end_gives_its_token_to_the_next(self) -> None:
        scheduler = TransferScheduler(Limits(stores=1, blocks=1))
        ops = [leader(f"s{n}") for n in range(3)]
        pair(scheduler, *ops)
        assert scheduler.poll(0.0) == [ops[0]]
        assert scheduler.poll(0.0) == []
        scheduler.commit("s0")
        scheduler.finished(done(ops[0]), 0.0)
        assert scheduler.poll(0.0) == [ops[1]]
        assert scheduler.cancel("s1")
        assert scheduler.poll(0.0) == [ops[2]]

    @pytest.mark.statement("connector", 44)
    @pytest.mark.bug("B8")
    def test_ops_that_wait_delay_nobody(self) -> None:
        """Checklist 44: one store without its partner, one without its iteration; all others finish."""
        scheduler = TransferScheduler(Limits(stores=1))
        scheduler.submit(leader("lonely"), 0.0)
        pair(scheduler, leader("too-early", requirement=Requirement(RequirementKind.ITERATION_COMPLETE, 99)))
        pair(scheduler, *[leader(f"s{n}") for n in range(50)])
        assert execute(scheduler) == [f"s{n}" for n in range(50)]
        assert scheduler.pending() == 2

    def test_a_cancelled_op_in_the_queue_is_passed_over(self) -> None:
        scheduler = TransferScheduler(Limits(stores=1))
        pair(scheduler, *[leader(f"s{n}") for n in range(4)])
        for op_id in ("s0", "s2"):
            scheduler.cancel(op_id)
        assert execute(scheduler) == ["s1", "s3"]

    @pytest.mark.statement("connector", 45)
    def test_small_ops_share_a_token_up_to_a_number_of_blocks(self) -> None:
        scheduler = TransferScheduler(Limits(loads=1, stores=2, blocks=16))
        sizes = {"a": 6, "b": 6, "c": 6, "d": 40, "e": 1}
        pair(scheduler, *[leader(op_id, blocks=count) for op_id, count in sizes.items()])
        assert [op.op_id for op in scheduler.poll(0.0)] == ["a", "b", "c"], "12 blocks, then 6 with the second token"
        for op_id in ("a", "c"):
            assert scheduler.commit(op_id)
        assert scheduler.finished(done(leader("a")), 0.0)
        assert scheduler.poll(0.0) == [], "b still holds what it shared with a"
        assert scheduler.cancel("b")
        assert [op.op_id for op in scheduler.poll(0.0)] == ["d"], "a large op has a token for itself, and is not split"
        assert scheduler.finished(done(leader("c")), 0.0)
        assert [op.op_id for op in scheduler.poll(0.0)] == ["e"]

    @pytest.mark.statement("connector", 45)
    def test_the_defaults_are_four_transfers_of_sixteen_blocks(self) -> None:
        scheduler = TransferScheduler()
        for direction in (Direction.STORE, Direction.LOAD):
            pair(scheduler, *[leader(f"{direction.label}{n}", direction, blocks=16) for n in range(5)])
        started = [op.op_id for op in scheduler.poll(0.0)]
        assert started == [f"{label}{n}" for label in ("load", "store") for n in range(4)]

    @pytest.mark.statement("connector", 45)
    @pytest.mark.parametrize("name", ["loads", "stores", "demotions", "orphan_timeout_s", "remember", "blocks"])
    @pytest.mark.parametrize("value", [0, -1, float("nan")])
    def test_limits_must_be_positive(self, name: str, value: float) -> None:
        with pytest.raises(ConfigError, match=name):
            Limits(**{name: value})


class TestEnding:
    """Cancellation and deadlines in every phase, and what a late executor may still do."""

    @staticmethod
    def bring(scheduler: TransferScheduler, phase: str) -> LeaderTransferRequest:
        op = leader("a", requirement=Requirement(RequirementKind.ITERATION_COMPLETE, 1), timeout_s=10.0)
        scheduler.submit(op, 0.0)
        if phase == "half":
            return op
        scheduler.enqueue(half_of(op), 0.0)
        if phase == "waiting":
            return op
        scheduler.end_iteration(1)
        if phase == "ready":
            return op
        assert scheduler.poll(0.0) == [op]
        if phase == "committed":
            assert scheduler.commit("a")
        return op

    @pytest.mark.statement("connector", 65)
    @pytest.mark.statement("connector", 66)
    @pytest.mark.statement("connector", 67)
    @pytest.mark.parametrize("phase", ["half", "waiting", "ready", "started"])
    @pytest.mark.parametrize("how", ["cancel", "cancel_request", "expire", "poll", "abort", "cancel_all"])
    def test_before_commitment_an_op_is_dropped_at_once(self, phase: str, how: str) -> None:
        scheduler = TransferScheduler()
        op = self.bring(scheduler, phase)
        {
            "cancel": lambda: scheduler.cancel("a"),
            "cancel_request": lambda: scheduler.cancel_request("request"),
            "expire": lambda: scheduler.expire(10.0),
            "poll": lambda: scheduler.poll(10.0),
            "abort": scheduler.abort,
            "cancel_all": lambda: scheduler.cancel_all("closed"),
        }[how]()
        (result,) = scheduler.take_results()
        expired = how in {"expire", "poll"}
        assert result.status is (OpStatus.EXPIRED if expired else OpStatus.CANCELLED)
        assert result.reason == (
            f"deadline_{phase}" if expired else "cancelled" if "request" in how or how == "cancel" else "closed"
        )
        assert (result.failed, result.request_id, result.direction) == ((0, 1), "request", Direction.STORE)
        assert result.quarantined == (phase == "started")
        assert (scheduler.pending(), scheduler.next_deadline()) == (0, None)

        assert not scheduler.commit("a"), "a dropped op never commits"
        assert not scheduler.is_running("a")
        pair(scheduler, op)
        scheduler.end_iteration(2)
        assert scheduler.poll(20.0) == []
        assert scheduler.quarantined() == (frozenset({"a"}) if phase == "started" else frozenset())
        assert not scheduler.finished(done(op), 20.0)
        assert not scheduler.finished(done(op), 20.0)
        assert scheduler.quarantined() == frozenset()
        assert scheduler.take_released() == (["a"] if phase == "started" else [])
        assert (scheduler.take_results(), scheduler.take_released()) == ([], [])

    @pytest.mark.statement("connector", 65)
    def test_after_commitment_an_op_runs_to_its_end(self) -> None:
        scheduler = TransferScheduler()
        op = self.bring(scheduler, "committed")
        assert not scheduler.cancel("a")
        assert scheduler.cancel_request("request") == 0
        scheduler.expire(1000.0)
        scheduler.cancel_all("closed")
        assert (scheduler.take_results(), scheduler.pending(), scheduler.next_deadline()) == ([], 1, None)
        assert scheduler.is_running("a")
        assert scheduler.finished(done(op), 1000.0)
        assert statuses(scheduler) == {"a": OpStatus.DONE}
        assert scheduler.quarantined() == frozenset()

    def test_an_abort_waits_for_nothing_but_keeps_the_memory_apart(self) -> None:
        scheduler = TransferScheduler()
        op = self.bring(scheduler, "committed")
        scheduler.abort()
        (result,) = scheduler.take_results()
        assert (result.status, result.reason, result.quarantined) == (OpStatus.CANCELLED, "closed", True)
        scheduler.finished(done(op), 0.0)
        assert (scheduler.take_results(), scheduler.take_released()) == ([], ["a"])

    @pytest.mark.statement("connector", 65)
    def test_the_commitment_point_is_passed_once(self) -> None:
        scheduler = TransferScheduler()
        assert not scheduler.commit("unknown")
        self.bring(scheduler, "started")
        assert scheduler.commit("a")
        assert not scheduler.commit("a")

    @pytest.mark.parametrize("phase", ["half", "waiting", "ready"])
    def test_an_op_that_was_not_started_cannot_commit_or_finish(self, phase: str) -> None:
        scheduler = TransferScheduler()
        op = self.bring(scheduler, phase)
        before = scheduler.dump()
        assert not scheduler.commit("a")
        assert not scheduler.finished(done(op), 0.0)
        assert (scheduler.dump(), scheduler.take_results()) == (before, [])

    def test_done_without_commitment_is_a_bug_and_is_said(self) -> None:
        scheduler = TransferScheduler()
        op = self.bring(scheduler, "started")
        with pytest.raises(StateError, match=r"op a .* not committed"):
            scheduler.finished(done(op), 0.0)
        assert scheduler.take_results() == []
        failed = OpResult("a", "request", Direction.STORE, OpStatus.FAILED, (0, 1), reason="device")
        assert scheduler.finished(failed, 0.0)
        assert statuses(scheduler) == {"a": OpStatus.FAILED}

    def test_a_result_carries_what_the_executor_says_and_the_scheduler_knows(self) -> None:
        scheduler = TransferScheduler()
        pair(scheduler, leader("a"), now=1.0)
        scheduler.poll(3.0)
        scheduler.commit("a")
        scheduler.finished(OpResult("a", "??", Direction.LOAD, OpStatus.DONE, (), b"sum", 7, 99.0, ""), 7.0)
        expected = OpResult("a", "request", Direction.STORE, OpStatus.DONE, (), b"sum", 7, 4.0, "")
        assert scheduler.take_results() == [expected]

    @pytest.mark.statement("connector", 38)
    @pytest.mark.bug("B6")
    def test_duplicated_unknown_and_replayed_results_end_nothing_else(self) -> None:
        """Checklist 38: completion is a set of ids."""
        scheduler = TransferScheduler()
        ops = [leader("a"), leader("b")]
        pair(scheduler, *ops)
        for op in scheduler.poll(0.0):
            scheduler.commit(op.op_id)
        for _ in range(5):
            scheduler.finished(done(ops[0]), 0.0)
            scheduler.finished(done(leader("nobody's")), 0.0)
        assert statuses(scheduler) == {"a": OpStatus.DONE}
        assert scheduler.pending() == 1
        assert (scheduler.has_ended("a"), scheduler.has_ended("b"), scheduler.has_ended("z")) == (True, False, True)

    @pytest.mark.statement("connector", 46)
    def test_a_lone_worker_half_is_given_up(self) -> None:
        scheduler = TransferScheduler(Limits(orphan_timeout_s=5.0))
        scheduler.enqueue(half_of(leader("a")), 1.0)
        assert scheduler.next_deadline() == 6.0
        scheduler.expire(5.9)
        assert scheduler.pending() == 1
        scheduler.expire(6.0)
        (result,) = scheduler.take_results()
        assert (result.status, result.failed, result.reason) == (OpStatus.EXPIRED, (), "deadline_half")
        scheduler.submit(leader("a"), 6.0)
        assert (scheduler.pending(), scheduler.poll(6.0)) == (0, [])

    def test_a_lone_half_does_not_live_longer_by_coming_again(self) -> None:
        scheduler = TransferScheduler(Limits(orphan_timeout_s=5.0))
        scheduler.enqueue(half_of(leader("a")), 0.0)
        scheduler.enqueue(half_of(leader("a")), 4.0)
        assert scheduler.next_deadline() == 5.0

    def test_the_leaders_deadline_replaces_that_of_the_lone_half(self) -> None:
        scheduler = TransferScheduler(Limits(orphan_timeout_s=5.0))
        scheduler.enqueue(half_of(leader("a")), 0.0)
        scheduler.submit(leader("a", timeout_s=100.0), 1.0)
        assert scheduler.next_deadline() == 101.0

    @pytest.mark.parametrize("timeout", [0.0, -3.0, float("nan")])
    def test_a_timeout_that_is_none_expires_at_once(self, timeout: float) -> None:
        scheduler = TransferScheduler()
        pair(scheduler, leader("a", timeout_s=timeout), now=2.0)
        assert scheduler.poll(2.0) == []
        assert statuses(scheduler) == {"a": OpStatus.EXPIRED}

    @pytest.mark.statement("connector", 47)
    @pytest.mark.parametrize("drop", [0, 1])
    @pytest.mark.parametrize("victim", range(6))
    def test_any_lost_half_ends_in_a_result_and_hurts_nobody(self, victim: int, drop: int) -> None:
        """Checklist 47."""
        scheduler = TransferScheduler(Limits(orphan_timeout_s=20.0))
        ops = [leader(f"op{n}", Direction(n % 3), timeout_s=10.0) for n in range(6)]
        for number, op in enumerate(ops):
            if not (number == victim and drop == 0):
                scheduler.submit(op, 0.0)
            if not (number == victim and drop == 1):
                scheduler.enqueue(half_of(op), 0.0)
        execute(scheduler)
        deadline = scheduler.next_deadline()
        assert deadline is not None
        scheduler.expire(deadline)
        expected = {op.op_id: OpStatus.DONE for op in ops} | {f"op{victim}": OpStatus.EXPIRED}
        assert statuses(scheduler) == expected
        assert scheduler.pending() == 0

    def test_a_request_is_cancelled_alone(self) -> None:
        scheduler = TransferScheduler()
        pair(scheduler, leader("a", request_id="x"), leader("b", request_id="y"), leader("c", request_id="x"))
        assert scheduler.cancel_request("x") == 2
        assert scheduler.cancel_request("x") == 0
        assert scheduler.cancel_request("unknown") == 0
        assert execute(scheduler) == ["b"]


@pytest.mark.statement("connector", 47)
class TestAsking:
    """What the leader did not hear of the first time."""

    def test_an_op_that_never_came_is_refused_once_and_for_all(self) -> None:
        scheduler, op = TransferScheduler(), leader("a", blocks=3)
        assert scheduler.account_for(op, 0.0) is Fate.REFUSED
        (result,) = scheduler.take_results()
        assert (result.status, result.failed, result.reason) == (OpStatus.CANCELLED, (0, 1, 2), "lost")
        pair(scheduler, op)
        assert (scheduler.poll(0.0), scheduler.pending()) == ([], 0), "it came late, after it was refused"
        assert scheduler.account_for(op, 0.0) is Fate.ENDED

    def test_an_op_that_is_under_way_goes_on(self) -> None:
        scheduler, op = TransferScheduler(), leader("a")
        scheduler.enqueue(half_of(op), 0.0)
        assert scheduler.account_for(op, 0.0) is Fate.PENDING
        scheduler.submit(op, 0.0)
        assert scheduler.account_for(op, 0.0) is Fate.PENDING
        assert execute(scheduler) == ["a"]
        assert scheduler.account_for(op, 0.0) is Fate.ENDED
        assert statuses(scheduler) == {"a": OpStatus.DONE}

    def test_memory_that_is_kept_apart_is_said_to_be(self) -> None:
        scheduler, op = TransferScheduler(), leader("a")
        pair(scheduler, op)
        scheduler.poll(0.0)
        scheduler.cancel("a")
        assert scheduler.account_for(op, 0.0) is Fate.QUARANTINED
        scheduler.finished(done(op), 0.0)
        assert scheduler.account_for(op, 0.0) is Fate.ENDED


class TestMemory:
    @pytest.mark.statement("connector", 48)
    def test_a_hundred_thousand_ops_leave_nothing_behind(self) -> None:
        scheduler = TransferScheduler(Limits(remember=100))
        ended = 0
        for number in range(100_000):
            op = leader(f"op{number}", request_id=f"r{number}")
            scheduler.submit(op, float(number))
            if number % 5:
                scheduler.enqueue(half_of(op), float(number))
            if number % 5 == 1:
                scheduler.cancel(op.op_id)
            execute(scheduler, float(number))
            ended += len(scheduler.take_results())
        scheduler.expire(1e9)
        assert ended + len(scheduler.take_results()) == 100_000
        assert (scheduler.pending(), scheduler.dump(), scheduler.next_deadline()) == (0, [], None)
        assert (scheduler.quarantined(), scheduler.take_released()) == (frozenset(), [])

    @pytest.mark.statement("connector", 48)
    def test_nothing_is_left_of_ops_that_ended(self) -> None:
        """Checklist 48, through what can be seen from outside."""
        scheduler = TransferScheduler(Limits(remember=100))
        for number in range(5_000):
            pair(scheduler, leader(f"op{number}"), now=float(number))
            if number % 3:
                execute(scheduler, float(number))
            else:
                scheduler.cancel(f"op{number}")
        assert len(scheduler.take_results()) == 5_000
        assert (scheduler.pending(), scheduler.dump(), scheduler.next_deadline()) == (0, [], None)
        assert scheduler.poll(0.0) == []

    @pytest.mark.statement("connector", 48)
    def test_a_long_life_takes_no_more_memory_than_a_short_one(self) -> None:
        scheduler = TransferScheduler(Limits(remember=100))

        def live(start: int, end: int) -> None:
            for number in range(start, end):
                requirement = Requirement(RequirementKind.ITERATION_COMPLETE, number)
                pair(scheduler, leader(f"op{number}", Direction.STORE, requirement, f"request{number}"), now=0.0)
                if number % 2:
                    scheduler.end_iteration(number)
                    execute(scheduler)
                else:
                    scheduler.cancel_request(f"request{number}")
                scheduler.take_results()

        # Traced from the first op on: what was allocated before the trace would count as growth once it is replaced.
        tracemalloc.start()
        try:
            live(0, 3000)
            before = tracemalloc.get_traced_memory()[0]
            live(3000, 9000)
            growth = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert growth < 6000 * 8, "6000 ops that ended left something behind"

    def test_replays_are_recognised_as_long_as_promised(self) -> None:
        scheduler = TransferScheduler(Limits(remember=2))
        for op_id in ("a", "b", "c"):
            pair(scheduler, leader(op_id))
            execute(scheduler)
        pair(scheduler, leader("b"), leader("c"))
        assert scheduler.pending() == 0
        pair(scheduler, leader("a"))
        assert scheduler.pending() == 1

    def test_dump_tells_what_an_op_waits_for(self) -> None:
        scheduler = TransferScheduler()
        scheduler.submit(leader("a", blocks=3), 0.0)
        assert scheduler.dump() == [
            {
                "op_id": "a",
                "request_id": "request",
                "direction": "STORE",
                "phase": "HALF",
                "leader_half": True,
                "worker_half": False,
                "blocks": 3,
            }
        ]


def test_a_load_that_a_step_waits_for_takes_no_token_and_comes_first() -> None:
    """L5: however many loads hang, the forward pass does not wait for one of them."""
    scheduler = TransferScheduler(Limits(loads=1, blocks=1))
    pair(scheduler, leader("hangs", Direction.LOAD), leader("next", Direction.LOAD))
    assert [op.op_id for op in scheduler.poll(0.0)] == ["hangs"]
    awaited = [msgspec.structs.replace(leader(name, Direction.LOAD), layerwise=True) for name in ("a", "b")]
    pair(scheduler, *awaited)
    assert [op.op_id for op in scheduler.poll(0.0)] == ["a", "b"]
    for op in awaited:
        assert scheduler.commit(op.op_id)
        assert scheduler.finished(done(op), 0.0)
    assert scheduler.poll(0.0) == [], "it gave no token back that it never took"
    assert scheduler.cancel("hangs")
    assert [op.op_id for op in scheduler.poll(0.0)] == ["next"]


def test_a_load_that_a_step_waits_for_ends_by_its_deadline_like_any_other() -> None:
    scheduler = TransferScheduler(Limits(loads=1))
    op = msgspec.structs.replace(leader("a", Direction.LOAD, timeout_s=2.0), layerwise=True)
    pair(scheduler, op)
    assert scheduler.poll(2.0) == []
    (result,) = scheduler.take_results()
    assert (result.status, result.quarantined) == (OpStatus.EXPIRED, False)
