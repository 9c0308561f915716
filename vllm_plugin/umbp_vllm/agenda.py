"""Which running requests are worth a look in a step, found without looking at all the others.

A request in decode takes a known most of tokens per step.  So whoever looks at it can say for how many tokens
nothing will happen, and gets it back in the first step in which something may have happened.  What a step costs
is in proportion to the requests that come, go or reach their next event, not to those that run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Agenda:
    """The requests of vLLM's batch and their appointments.  Scheduler thread only.

    ``stride`` is the most tokens that a decoding request takes per step (more than one in speculative decoding).
    A request that takes more in a step is due in it.
    """

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._step = 0
        self._torn = False
        self._running: set[str] = set()
        self._absent: set[str] = set()
        self._appointments: dict[int, list[str]] = {}
        self._next: dict[str, int] = {}
        self._unseen: list[str] = []

    def __contains__(self, request_id: str) -> bool:
        """Whether the request was in the last step."""
        return request_id in self._running and request_id not in self._absent

    def step(self, number: int, output: Any) -> tuple[list[str], list[str], list[str]]:
        """Take vLLM's scheduler output of step ``number``: the requests that joined, may be due, and left.

        Joined are those that were not in the step before; left are those that run and, unlike before, are not in
        this one.  Of the due ones some have not come as far as they could have, and some are not in this step at
        all.  Numbers grow by one; after a gap, which something that went wrong has torn, every request is due, and from
        then on whole batches are compared.
        """
        scheduled: Mapping[str, int] = output.num_scheduled_tokens
        joined = [new.req_id for new in output.scheduled_new_reqs]
        joined += output.scheduled_cached_reqs.resumed_req_ids
        more = output.total_num_scheduled_tokens - len(scheduled)
        if more:
            more -= sum([scheduled[request_id] - 1 for request_id in joined])
        due = self._unseen + self._kept(number)
        if more:
            due += [request_id for request_id, tokens in scheduled.items() if tokens > self._stride]
        if number != self._step + 1:
            self._torn = True
            self._appointments.clear()
            due = list(scheduled)
        self._step = number
        self._running.update(joined)
        left: list[str] = []
        if self._absent or self._torn or len(self._running) != len(scheduled):
            joined, left = self._compare(joined, scheduled)
        self._unseen = joined + due
        return joined, due, left

    def _kept(self, step: int) -> list[str]:
        """The requests whose appointment was at ``step`` and was not moved since."""
        kept = []
        for request_id in self._appointments.pop(step, ()):
            if self._next.get(request_id) == step:
                del self._next[request_id]
                kept.append(request_id)
        return kept

    def _compare(self, joined: list[str], scheduled: Mapping[str, int]) -> tuple[list[str], list[str]]:
        """Who joined and who left, judged by the whole batch."""
        strangers = scheduled.keys() - self._running
        back = [request_id for request_id in self._absent if request_id in scheduled]
        absent = self._running - scheduled.keys()
        left = absent - self._absent
        self._running |= strangers
        self._absent = absent
        return list(dict.fromkeys([*joined, *back, *strangers])), list(left)

    def seen(self) -> None:
        """Everybody that the last :meth:`step` named was looked at; without this call they are due in the next one."""
        self._unseen = []

    def meet(self, request_id: str, quiet: int) -> None:
        """Let the request be due when it can have taken more than ``quiet`` tokens after the current step."""
        step = self._step + (quiet // self._stride + 1 if quiet > 0 else 1)
        self._next[request_id] = step
        appointments = self._appointments.get(step)
        if appointments is None:
            self._appointments[step] = [request_id]
        else:
            appointments.append(request_id)

    def leave(self, request_id: str) -> None:
        """The request is no longer in the batch: finished or preempted.  It may join again."""
        self._running.discard(request_id)
        self._absent.discard(request_id)
        self._next.pop(request_id, None)
