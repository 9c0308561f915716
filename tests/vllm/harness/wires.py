"""What lies between the leader and the workers, where messages get lost, come twice, or come late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tests.vllm.harness.umbp import UmbpHarness
from umbp_vllm.metadata import StepMetadata, WorkerReport
from umbp_vllm.worker import Worker


class Fault(Enum):
    """What happens to a message."""

    NONE = "none"
    DROP = "drop"
    DUPLICATE = "duplicate"
    """It comes again, with the next one."""
    DELAY = "delay"
    """It comes behind the next but one."""


@dataclass(frozen=True)
class Message:
    """One message: to or from a rank, and the how-manieth of its kind and rank."""

    rank: int
    kind: str
    """``step`` (leader to worker) or ``report`` (worker to leader)."""
    number: int
    says: bool
    """Whether it says anything beyond its number."""


Judge = Callable[[Message], Fault]


def says_something(metadata: StepMetadata) -> bool:
    """Whether the instructions of a step ask for anything."""
    said = (metadata.ops, metadata.cancels, metadata.refused_loads, metadata.new_slots, metadata.overdue)
    return any(said) or metadata.who


class Wire:
    """Both directions of one rank.

    A step that is lost is lost for all hooks of the rank: as far as the worker can tell, the engine never ran it.
    """

    def __init__(self, rank: int, worker: Worker, judge: Judge, seen: list[Message]) -> None:
        self._rank = rank
        self._judge = judge
        self._seen = seen
        self._store_ahead, self._fence, self._step = worker.store_ahead, worker.fence, worker.step
        self._take_report = worker.take_report
        self._fates: dict[int, Fault] = {}
        self._late_steps: list[list[Any]] = []
        self._late_reports: list[list[Any]] = []
        self._reports = 0
        worker.store_ahead = self.store_ahead  # type: ignore[method-assign]
        worker.fence = self.fence  # type: ignore[method-assign]
        worker.step = self.step  # type: ignore[method-assign]
        worker.take_report = self.take_report  # type: ignore[method-assign]

    def _fate(self, metadata: StepMetadata) -> Fault:
        number = metadata.iteration
        if number not in self._fates:
            message = Message(self._rank, "step", number, says_something(metadata))
            self._seen.append(message)
            self._fates[number] = self._judge(message)
        return self._fates[number]

    def _arrives(self, metadata: StepMetadata) -> bool:
        return self._fate(metadata) in (Fault.NONE, Fault.DUPLICATE)

    def store_ahead(self, metadata: StepMetadata) -> None:
        if self._arrives(metadata):
            self._store_ahead(metadata)

    def fence(self, metadata: StepMetadata) -> None:
        if self._arrives(metadata):
            self._fence(metadata)

    def step(self, metadata: StepMetadata) -> None:
        fate = self._fate(metadata)
        if self._arrives(metadata):
            self._step(metadata)
        for late in _due(self._late_steps):
            self._store_ahead(late)
            self._step(late)
        if fate is not Fault.NONE and fate is not Fault.DROP:
            self._late_steps.append([2 if fate is Fault.DELAY else 1, metadata])

    def take_report(self) -> WorkerReport | None:
        said = self._take_report()
        told: list[WorkerReport] = _due(self._late_reports)
        if said is not None:
            self._reports += 1
            message = Message(self._rank, "report", self._reports, says=True)
            self._seen.append(message)
            fate = self._judge(message)
            if fate in (Fault.NONE, Fault.DUPLICATE):
                told.insert(0, said)
            if fate in (Fault.DUPLICATE, Fault.DELAY):
                self._late_reports.append([2 if fate is Fault.DELAY else 1, said])
        merged: Any = None
        for report in told:
            merged = report if merged is None else merged.aggregate(report)
        return merged  # type: ignore[no-any-return]


def _due(late: list[list[Any]]) -> list[Any]:
    for entry in late:
        entry[0] -= 1
    due = [entry[1] for entry in late if not entry[0]]
    late[:] = [entry for entry in late if entry[0]]
    return due


def put_wires(engine: UmbpHarness, judge: Judge) -> list[Message]:
    """Let ``judge`` decide about every message of ``engine`` from now on; the messages, as they come."""
    engine.loses_messages = True
    seen: list[Message] = []
    for rank, worker in enumerate(engine.workers):
        Wire(rank, worker, judge, seen)
    return seen
