"""What vLLM must hear about loads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from umbp_core.ops import LeaderTransferRequest, OpResult, OpStatus


@dataclass(slots=True)
class LoadOutcome:
    """What vLLM must hear about loads after one step.

    ``ended`` are request ids whose load ended, well or not; ``failed`` those of them that failed;
    ``bad_blocks`` the HBM blocks that hold nothing because of it.
    """

    ended: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)

    def add(self, op: LeaderTransferRequest, result: OpResult) -> None:
        """A load has ended."""
        self.ended.add(op.request_id)
        if result.status is OpStatus.DONE:
            return
        indexes: Iterable[int] = result.failed or range(len(op.blocks))
        self.never_came(op.request_id, [op.blocks[index].hbm_block for index in indexes])

    def never_came(self, request_id: str, blocks: Iterable[int]) -> None:
        """A load that the request waits for has ended, and ``blocks`` hold nothing."""
        self.ended.add(request_id)
        self.failed.add(request_id)
        self.bad_blocks.update(blocks)
