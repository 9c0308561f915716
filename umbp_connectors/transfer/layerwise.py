"""How the engine carries out a layer-wise load: a forward pass is under way and waits for it, layer by layer.

::

    hashing: plan ─► hashing: verify everything ─► commit ─► copy band 0, band 1, ... (saying so each time) ─► result

All blocks are verified before the first byte of any is delivered (law L1): the stored checksum covers an object and
not its layers, and verifying memory takes less time than copying it.  So what does not verify never reaches HBM,
and no layer is computed with bytes that turn out to be wrong later.

The op is given up when the forward pass cannot wait any longer; it then ends after the copy that is being made.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Final

from umbp_connectors.transfer.jobs import DEVICE, Control, Step, Tools
from umbp_connectors.transfer.loads import LoadJob
from umbp_core.errors import StateError, TransferError
from umbp_core.ops import LeaderTransferRequest
from umbp_core.ports import LayerCopier

DEADLINE: Final = "deadline"
"""The label of blocks that the forward pass did not wait for any longer."""


class Delivered:
    """How far the layer-wise loads of one engine are, and which are given up.  The engine's lock must be held."""

    def __init__(self) -> None:
        self._bands: dict[str, int] = {}
        self._given_up: set[str] = set()

    def reached(self, op_id: str, bands: int) -> bool:
        """The first ``bands`` bands of the op are in place, or more by now; returns whether it may go on."""
        self._bands[op_id] = max(bands, self.bands(op_id))
        return op_id not in self._given_up

    def bands(self, op_id: str) -> int:
        """Bands in place, counted from the first."""
        return self._bands.get(op_id, 0)

    def give_up(self, op_id: str) -> None:
        """Let the op end at the next band."""
        self._given_up.add(op_id)

    def forget(self, op_id: str) -> None:
        """The op has ended."""
        self._bands.pop(op_id, None)
        self._given_up.discard(op_id)


class _Progress:
    """How many bands are complete when each takes ``copies`` copies.  Any thread."""

    def __init__(self, bands: int, copies: int) -> None:
        self._left = [copies] * bands
        self._complete = 0
        self._lock = threading.Lock()

    def made(self, band: int) -> int:
        """One copy of ``band`` was made; how many bands are complete from the first on."""
        with self._lock:
            self._left[band] -= 1
            while self._complete < len(self._left) and not self._left[self._complete]:
                self._complete += 1
            return self._complete

    @property
    def is_over(self) -> bool:
        """Whether the last copy was made."""
        return self._complete == len(self._left)


class LayerwiseLoadJob(LoadJob):
    """DRAM to HBM, in the order of the layers."""

    def __init__(self, op: LeaderTransferRequest, fence: object, tools: Tools, control: Control) -> None:
        super().__init__(op, fence, tools, control)
        self._good: list[int] = []
        self._stopped = False

    def _plan(self) -> None:
        self._reject_repeats()
        if any(block.ssd_slot >= 0 for block in self._op.blocks):
            raise StateError(f"op {self._op.op_id}: a layer-wise load must not wait for a disk; load such blocks whole")
        everything = range(len(self._op.blocks))
        hashing = self._tools.hashing
        self._spread(
            [(hashing, functools.partial(self._check, share)) for share in self._shares(everything)], self._hand_over
        )

    def _hand_over(self) -> None:
        """Everything is verified."""
        self._good = [index for index in range(len(self._op.blocks)) if index not in self._failed]
        if not (self._good and self._control.is_running(self._op.op_id) and self._may_write()):
            self._end()
            return
        copier = self._layers()
        on_host = self._tools.copier.on_host
        lanes = self._tools.hashing if on_host else self._tools.device
        shares = self._shares(self._good) if on_host else [self._good]
        bands = max(copier.bands(group) for group in self._by_group(self._good))
        progress = _Progress(bands, len(shares))
        copies: list[Step] = [
            (lanes, functools.partial(self._deliver_band, copier, progress, band, share))
            for band in range(bands)
            for share in shares
        ]
        # The first layers of all loads of a step come before the later ones of any.
        self._spread(copies, self._end, lambda index: index / len(copies))

    def _layers(self) -> LayerCopier:
        if self._tools.layers is None:
            raise StateError(f"op {self._op.op_id}: this engine's copier cannot copy single layers; load it whole")
        return self._tools.layers

    def _deliver_band(self, copier: LayerCopier, progress: _Progress, band: int, members: Sequence[int]) -> None:
        if self._stopped:
            return
        self._copy(copier, band, [index for index in members if index not in self._failed])
        complete = progress.made(band)
        if not self._control.delivered(self._op.op_id, complete) and not progress.is_over:
            self._stopped = True
            error = TransferError(f"op {self._op.op_id} was given up when {complete} bands of layers were there")
            self._fail(self._good, DEADLINE, error)

    def _copy(self, copier: LayerCopier, band: int, indexes: Sequence[int]) -> None:
        blocks = self._op.blocks
        for group, members in self._by_group(indexes).items():
            if band < copier.bands(group):
                copy = functools.partial(
                    copier.scatter_band,
                    group,
                    band,
                    [blocks[index].hbm_block for index in members],
                    [blocks[index].dram_page for index in members],
                    self._fence,
                )
                self._attempt(members, DEVICE, copy)

    def _end(self) -> None:
        self._moved = [index for index in self._good if index not in self._failed]
        super()._end()
