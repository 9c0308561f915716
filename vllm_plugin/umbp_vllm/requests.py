"""What the leader knows about one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from umbp_core.slot_table import LIFE, LifeEvent
from umbp_core.slots import Slot
from umbp_vllm.adapters import Adapters
from umbp_vllm.enquiries import Enquiry
from umbp_vllm.groups import KvGroup
from umbp_vllm.matching import RequestKeys, StagedMatch
from umbp_vllm.priorities import RequestPriorities

NEVER = 1 << 62
"""A token count that no request reaches."""
AT_ONCE = -1
"""Below every token count."""


@dataclass(slots=True)
class RequestState:
    """One live request: vLLM's own object, its slot, and how far it was looked at.

    ``evaluated`` counts, per group, the blocks for which storing was decided; the next one gets full at ``next_full``
    computed tokens.  Up to ``quiet_until`` computed tokens nothing happens that the leader must look at.  ``loading``
    is the id of the load in flight, ``shared_keys`` what others may wait for, ``local_tokens`` what vLLM held itself
    when it last asked.  A load ``at_once`` is layer-wise: what the step ``unsure_in`` computes counts only when it is
    known to have ended well.  ``promised`` is the number of tokens that the staged match gives.  ``counted`` says that
    the statistics have its lookup: vLLM asks in every step in which the request finds no room.  ``priorities`` and
    ``sighted`` (that it was seen to use blocks in DRAM) belong to the offload policies, ``enquiry`` to the daemon's.
    """

    request: Any
    keys: RequestKeys
    slot: Slot
    evaluated: list[int]
    next_full: int = AT_ONCE
    quiet_until: int = AT_ONCE
    staged: StagedMatch | None = None
    loading: str | None = None
    shared_keys: tuple[bytes, ...] = ()
    may_load: bool = True
    asked_since: float | None = None
    local_tokens: int = 0
    promised: int = 0
    counted: bool = False
    at_once: bool = False
    unsure_in: int = -1
    hit_tokens: dict[str, int] = field(default_factory=dict)
    priorities: RequestPriorities | None = None
    sighted: bool = False
    enquiry: Enquiry | None = None

    @classmethod
    def of(cls, request: Any, slot: Slot, groups: Sequence[KvGroup], adapters: Adapters) -> RequestState:
        """A state for a request that vLLM has just received."""
        keys = RequestKeys(request, groups, adapters.of(request.lora_request))
        return cls(request, keys, slot, [0] * len(groups))

    def looked_at(self, tokens: int) -> int:
        """Everything that ``tokens`` computed tokens bring is decided: set ``quiet_until``; how far off it is.

        The next token after it fills a block or is the first one decoded.
        """
        if self.keys.are_refused:
            self.next_full = NEVER
        prompt: int = self.request.num_prompt_tokens
        self.quiet_until = prompt if tokens <= prompt < self.next_full else self.next_full - 1
        return self.quiet_until - tokens

    def preempted(self) -> None:
        """The engine took the request's HBM blocks: everything about them is decided anew."""
        if LifeEvent.PREEMPT in LIFE[self.slot.life]:
            self.slot.preempted()
        self.quiet_until = self.next_full = AT_ONCE
        self.evaluated = [0] * len(self.evaluated)
        self.counted = False
