"""All ranks together: the same ends everywhere whatever each one's pace, and no message that must not be lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from tests.connectors.transfer.simulated import Cluster, random_op
from umbp_core.ops import Direction, OpStatus

FAULTS = {"drop": (), "duplicate": (0, 3), "delay": (4,), "long delay": (40,)}


@pytest.mark.statement("connector", 85)
def test_four_ranks_at_their_own_pace_end_with_the_same_sets() -> None:
    """10^4 steps; ops fail on single ranks, and are cancelled while some ranks have committed them and others not."""
    rng = random.Random(85)
    cluster = Cluster(ranks=4, seed=85, slowest=12, failing=0.02)
    number = 0
    for iteration in range(10_000):
        for _ in range(rng.choice((0, 0, 1, 2))):
            number += 1
            cluster.send(random_op(rng, number, iteration))
        if rng.random() < 0.1 and number:
            cluster.cancel(f"op{max(1, number - rng.randint(0, 5))}")
        cluster.step()
    cluster.settle(200)
    assert cluster.left() == {}
    loads = Counter(op.request_id for op in cluster.sent if op.direction is Direction.LOAD)
    for rank in cluster.ranks:
        assert rank.finished == loads, f"rank {rank.number}"
    assert cluster.verdicts.keys() == {op.op_id for op in cluster.sent}
    mixed = 0
    for op_id, verdict in cluster.verdicts.items():
        statuses = set(cluster.per_rank[op_id].values())
        assert len(cluster.per_rank[op_id]) == 4
        assert (verdict.status is OpStatus.DONE) == (statuses == {OpStatus.DONE})
        mixed += len(statuses) > 1
    assert mixed > 100, "ranks that always agree prove nothing"


def story(judge: object, seed: int = 1) -> Cluster:
    """Eight ops on two ranks, one of them cancelled, until everything is over."""
    rng = random.Random(seed)
    cluster = Cluster(ranks=2, seed=seed, judge=judge, slowest=3)  # type: ignore[arg-type]
    for number in range(1, 9):
        cluster.send(random_op(rng, number, cluster.iteration, timeout_s=8.0))
        if number == 5:
            cluster.cancel("op5")
        cluster.step()
    cluster.settle(120)
    for _ in range(100):  # what is late comes, and halves that nobody claims are given up
        cluster.step()
    return cluster


def check_ended(cluster: Cluster, told: str) -> None:
    assert cluster.left() == {}, told
    loads = Counter(op.request_id for op in cluster.sent if op.direction is Direction.LOAD)
    for rank in cluster.ranks:
        assert rank.finished == loads, f"{told}, rank {rank.number}"
    assert cluster.verdicts.keys() == {op.op_id for op in cluster.sent}, told


@pytest.mark.statement("connector", 47)
@pytest.mark.statement("connector", 66)
@pytest.mark.bug("B9")
@pytest.mark.parametrize("fault", FAULTS)
def test_every_message_in_turn(fault: str) -> None:
    """Halves, cancellations, questions, results and releases: each alone is dropped, doubled or delayed."""
    messages = story(lambda _: (0,)).channel.sent
    assert {"leader half", "worker half", "cancel", "result"} <= set(messages)
    for victim in range(len(messages)):
        count = iter(range(10**6))

        def judge(_: str, victim: int = victim, count: object = count) -> Sequence[int]:
            return FAULTS[fault] if next(count) == victim else (0,)  # type: ignore[call-overload]

        check_ended(story(judge), f"{fault} of message {victim}, a {messages[victim]}")


@pytest.mark.statement("connector", 47)
@pytest.mark.parametrize("hundred", range(3))
def test_any_of_them_at_random(hundred: int) -> None:
    """A tenth of all messages, also of the questions about what was lost."""
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        faults = random.Random(seed)

        def judge(_: str, faults: random.Random = faults) -> Sequence[int]:
            return faults.choice(list(FAULTS.values())) if faults.random() < 0.1 else (0,)

        check_ended(story(judge, seed), f"seed {seed}")


@pytest.mark.statement("connector", 35)
@pytest.mark.parametrize("hundred", range(10))
def test_the_halves_of_every_rendezvous_in_any_order(hundred: int) -> None:
    """10^3 interleavings of both halves and slots of eight ops on two ranks, some of them twice; nothing is lost."""
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        pace = random.Random(seed)

        def judge(kind: str, pace: random.Random = pace) -> Sequence[int]:
            late = [pace.randint(0, 6)] if "half" in kind else [0]
            return late + late if pace.random() < 0.2 else late

        cluster = story(judge, seed)
        check_ended(cluster, f"seed {seed}")
        cancelled = {op_id for op_id, verdict in cluster.verdicts.items() if verdict.status is not OpStatus.DONE}
        assert cancelled <= {"op5"}, f"seed {seed}"
