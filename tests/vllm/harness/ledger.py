"""Who was told what: checks every call to the leader and every report of a worker against vLLM's rules (L6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from tests.vllm.harness.errors import ReportFault


@dataclass
class Life:
    """What the scheduler and the connector said about one request since it was added."""

    matches: list[tuple[int, int | None, bool]] = field(default_factory=list)
    """(local hit, answer, asynchronous) of every match."""
    loads: list[int] = field(default_factory=list)
    """External tokens of every load that the scheduler accepted."""
    load_is_async: bool = False
    load_blocks: set[int] = field(default_factory=set)
    delayed: bool = False
    """``request_finished`` took over the blocks."""
    finished_calls: int = 0
    aborted_in_load: bool = False
    recving: Counter[int] = field(default_factory=Counter)
    sending: Counter[int] = field(default_factory=Counter)
    """Reports per rank."""


class Ledger:
    """Stands between the scheduler and the leader's connector, and beside the workers' reports."""

    def __init__(self, scheduler: Scheduler, group_count: int) -> None:
        self.scheduler = scheduler
        self.lives: dict[str, Life] = {}
        self._groups = group_count
        assert scheduler.connector is not None
        self._wrap(scheduler.connector)

    def added(self, request_id: str) -> None:
        """A request is about to be added; an id may come again after its first life."""
        self.lives[request_id] = Life()

    def external_tokens(self, request_id: str) -> int:
        """Tokens that the scheduler let the connector load for this request, over all its loads."""
        return sum(self.lives[request_id].loads)

    def _wrap(self, connector: KVConnectorBase_V1) -> None:
        matched = connector.get_num_new_matched_tokens
        allocated = connector.update_state_after_alloc
        finished = connector.request_finished_all_groups  # type: ignore[attr-defined]

        def get_num_new_matched_tokens(request: Request, computed: int) -> tuple[int | None, bool]:
            answer, is_async = matched(request, computed)
            self._check_match(request, computed, answer, is_async)
            return answer, is_async

        def update_state_after_alloc(request: Request, blocks: Any, count: int) -> None:
            allocated(request, blocks, count)
            life = self.lives[request.request_id]
            if count:
                life.loads.append(count)
                life.load_is_async = life.matches[-1][2]
                life.load_blocks = {block for group in blocks.get_block_ids() for block in group}

        def request_finished_all_groups(request: Request, blocks: tuple[list[int], ...]) -> tuple[bool, Any]:
            delayed, params = finished(request, blocks)
            life = self.lives[request.request_id]
            life.finished_calls += 1
            life.delayed = bool(delayed)
            return delayed, params

        connector.get_num_new_matched_tokens = get_num_new_matched_tokens  # type: ignore[method-assign]
        connector.update_state_after_alloc = update_state_after_alloc  # type: ignore[method-assign]
        connector.request_finished_all_groups = request_finished_all_groups  # type: ignore[attr-defined]

    def _check_match(self, request: Request, computed: int, answer: int | None, is_async: bool) -> None:
        life = self.lives[request.request_id]
        life.matches.append((computed, answer, is_async))
        if answer is None:
            return
        if answer < 0 or computed + answer > request.num_tokens:
            raise ReportFault(f"{request.request_id}: matched {answer} beyond {computed} of {request.num_tokens}")
        if answer == 0 and is_async:
            raise ReportFault(f"{request.request_id}: an asynchronous match of 0 tokens")
        if answer and not is_async and computed + answer >= request.num_tokens:
            raise ReportFault(f"{request.request_id}: a synchronous match leaves no token to compute")

    def aborting(self, request_id: str) -> None:
        """The engine is about to abort a request."""
        request = self.scheduler.requests.get(request_id)
        if request is None or request.is_finished():
            return
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            arrived = request_id in self.scheduler.finished_recving_kv_req_ids
            self.lives[request_id].aborted_in_load = not arrived

    def observe(self, outputs: Sequence[KVConnectorOutput]) -> None:
        """Check one step's reports of all ranks; called right before the scheduler gets them."""
        for rank, output in enumerate(outputs):
            sending, recving = output.finished_sending or set(), output.finished_recving or set()
            if sending & recving:
                raise ReportFault(f"rank {rank}: {sorted(sending & recving)} reported as sent and received at once")
            if output.failed_recving - recving:
                raise ReportFault(f"rank {rank}: {sorted(output.failed_recving)} failed but not reported as received")
            if output.invalid_block_ids and self._groups > 1:
                raise ReportFault(f"rank {rank}: block errors in a model with {self._groups} KV groups")
            for request_id in recving:
                self._observe_recving(rank, request_id)
            for request_id in sending:
                self._observe_sending(rank, request_id)
            self._observe_errors(rank, output.invalid_block_ids)

    def _life_of(self, rank: int, request_id: str) -> tuple[Life, Request]:
        request = self.scheduler.requests.get(request_id)
        if request is None:
            raise ReportFault(f"rank {rank} reported {request_id}, which the scheduler does not know (any more)")
        return self.lives[request_id], request

    def _observe_recving(self, rank: int, request_id: str) -> None:
        life, request = self._life_of(rank, request_id)
        life.recving[rank] += 1
        if life.recving[rank] > len(life.loads):
            raise ReportFault(f"rank {rank} reported {request_id} as received {life.recving[rank]} times")
        if request.is_finished():
            if not life.aborted_in_load:
                raise ReportFault(f"rank {rank} reported {request_id} as received after it finished without a load")
            if life.sending[rank]:
                raise ReportFault(f"rank {rank} reported {request_id} in both sets")
        elif request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
            raise ReportFault(f"rank {rank} reported {request_id} as received while it is {request.status.name}")

    def _observe_sending(self, rank: int, request_id: str) -> None:
        life, request = self._life_of(rank, request_id)
        life.sending[rank] += 1
        if life.sending[rank] > 1:
            raise ReportFault(f"rank {rank} reported {request_id} as sent twice")
        if not request.is_finished():
            raise ReportFault(f"rank {rank} reported {request_id} as sent although it is {request.status.name}")
        if not (life.delayed or life.aborted_in_load):
            raise ReportFault(f"rank {rank} reported {request_id} as sent, but its blocks were never handed over")
        if life.aborted_in_load and life.recving[rank] == len(life.loads):
            raise ReportFault(f"rank {rank} reported {request_id} in both sets")

    def _observe_errors(self, rank: int, invalid: set[int]) -> None:
        loading = set[int]()
        for request_id, life in self.lives.items():
            # A request that loads in its own step may have been aborted during it.
            if life.loads and (request_id in self.scheduler.requests or not life.load_is_async):
                loading |= life.load_blocks
        if invalid - loading:
            raise ReportFault(f"rank {rank} reported errors in blocks {sorted(invalid - loading)} that it never loads")
