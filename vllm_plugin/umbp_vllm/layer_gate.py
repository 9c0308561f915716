"""The forward pass of a step waits for the layers that its layer-wise loads bring.

vLLM promises these blocks to the requests of the very step, so the step's end must know of each block whether it was
there: what is not known to be is reported, vLLM then discards the tokens of its request and computes them again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from umbp_connectors.transfer.engine import TransferEngine
from umbp_core.ops import LeaderTransferRequest, OpResult, OpStatus
from umbp_core.ports import Clock

logger = logging.getLogger("vllm.umbp.layer_gate")

GRACE_S = 5.0
"""How long a step's end waits for a copy that is being made when its load is given up: it takes milliseconds."""


class LayerGate:
    """The layer-wise loads of one step on one rank.

    ``bands`` says how many bands must be in place before a layer is computed; a layer that it does not name waits
    for all.  Forward thread, except for :meth:`wait`, which microbatches may call from several threads.
    """

    def __init__(self, engine: TransferEngine, bands: Mapping[str, int], clock: Clock) -> None:
        self._engine = engine
        self._bands = bands
        self._all = max(bands.values(), default=1)
        self._clock = clock
        self._ops: dict[str, LeaderTransferRequest] = {}
        self._unsure: set[int] = set()
        self._passed = 0
        self._deadline = 0.0
        self._distrusted = False
        self._late: set[str] = set()

    def expect(self, ops: Sequence[LeaderTransferRequest]) -> None:
        """The step needs ``ops``; until each is known to have ended well, its blocks count as bad."""
        for op in ops:
            self._ops[op.op_id] = op
            self._unsure.update([block.hbm_block for block in op.blocks])

    def __contains__(self, op_id: str) -> bool:
        return op_id in self._ops

    @property
    def is_open(self) -> bool:
        """Whether the step needs any load."""
        return bool(self._ops)

    @property
    def has_late(self) -> bool:
        """Whether a copy hangs that was settled without it."""
        return bool(self._late)

    def lack(self, blocks: Iterable[int]) -> None:
        """The step counts on ``blocks``, which nothing fills."""
        self._unsure.update(blocks)

    def distrust(self) -> None:
        """Something went wrong in the step's waiting: what it read is not known to be right, however the loads end."""
        self._distrusted = True

    def start(self, iteration: int, fence: object) -> None:
        """Start what is expected, behind ``fence``, before the forward pass of step ``iteration`` is launched."""
        self._passed = 0
        self._deadline = self._clock() + min(op.timeout_s for op in self._ops.values())
        self._engine.submit_ahead(iteration, self._ops.values(), fence)

    def wait(self, layer: str) -> None:
        """Wait until ``layer`` is there, at most until the deadline; afterwards the loads are given up."""
        if self._ops:
            self._pass(self._bands.get(layer, self._all))

    def wait_for_all(self) -> None:
        """As :meth:`wait`, for every layer: nobody will ask for them one by one."""
        if self._ops:
            self._pass(self._all)

    def _pass(self, bands: int) -> None:
        if bands <= self._passed:
            return
        if not self._engine.wait_layers(self._ops, bands, self._deadline - self._clock()):
            self._engine.give_up(self._ops)
            bands = self._all
        self._passed = bands

    def finish(self) -> None:
        """The forward pass is launched: wait until the loads have ended, which is soon, since it waited for them."""
        if not self._ops:
            return
        self._pass(self._all)
        if not self._engine.wait(self._ops, max(0.0, self._deadline - self._clock())):
            self._engine.give_up(self._ops)
            if not self._engine.wait(self._ops, GRACE_S):
                logger.error("umbp: a copy of a layer-wise load hangs; its blocks stay out of use until it ends")

    def settle(self, results: Iterable[OpResult]) -> list[OpResult]:
        """The results of the step's loads, from all ``results``; one of a load that hangs is made up.

        Afterwards the step's loads are over.  A made-up result is quarantined; :meth:`released` tells when it ends.
        """
        ended = {result.op_id: result for result in results if result.op_id in self._ops}
        settled = []
        for op_id, op in self._ops.items():
            result = ended.get(op_id)
            if result is None:
                result = self._given_up(op)
            elif not self._distrusted and (result.failed or result.status is OpStatus.DONE):
                failed = set(result.failed)
                self._unsure.difference_update(
                    [block.hbm_block for index, block in enumerate(op.blocks) if index not in failed]
                )
            settled.append(result)
        self._ops = {}
        self._distrusted = False
        return settled

    def _given_up(self, op: LeaderTransferRequest) -> OpResult:
        hangs = not self._engine.wait([op.op_id], 0.0)
        if hangs:
            self._late.add(op.op_id)
        return OpResult(
            op.op_id,
            op.request_id,
            op.direction,
            OpStatus.FAILED,
            failed=tuple(range(len(op.blocks))),
            reason="deadline" if hangs else "internal",
            quarantined=hangs,
        )

    def released(self, results: Iterable[OpResult]) -> list[str]:
        """Those of ``results`` whose op had been settled without waiting for it any longer."""
        ended = [result.op_id for result in results if result.op_id in self._late]
        self._late.difference_update(ended)
        return ended

    def take_bad_blocks(self) -> set[int]:
        """The blocks that the step counted on and that are not known to have been there; each once."""
        bad, self._unsure = self._unsure, set()
        return bad
