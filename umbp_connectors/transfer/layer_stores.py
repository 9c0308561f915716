"""How the engine carries out a store that does not wait for the end of its step.

::

    STORE   device: commit ─► for each band: its layers are done ─► device: gather ┐
                                                       the last band ─► hashing: checksums ─► result

Each band leaves as soon as the forward pass is through with its layers, so copying overlaps with computing.  There is
one op, one checksum over the whole object and one result, after the last band: nobody can find half of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from umbp_connectors.transfer.jobs import DEVICE, Control, Step, StoreJob
from umbp_connectors.transfer.lanes import Lanes
from umbp_core.errors import StateError
from umbp_core.ops import OpStatus, Requirement, RequirementKind
from umbp_core.ports import LayerCopier
from umbp_core.progress import Progress

BehindLayers = Callable[[object], None]
"""Called with a fence that lies behind the layers that were waited for."""


class LayerWaits:
    """Who waits for which layers of a forward pass.  The engine's lock must be held, and is when they are called.

    Whoever waits is called at the latest when the iteration ends: a layer that never says that it is done (a replayed
    graph says nothing) costs the overlap and nothing else.
    """

    def __init__(self) -> None:
        self._progress = Progress()
        self._waiting: dict[str, tuple[list[Requirement], BehindLayers]] = {}
        self._count = 0

    def wait(self, iteration: int, layers: Sequence[str], fence: object, call: BehindLayers) -> None:
        """Call ``call`` when all ``layers`` are done; at once, with ``fence``, when they are."""
        self._count += 1
        key = str(self._count)
        wanted = [Requirement(RequirementKind.LAYER_NAME_COMPLETE, iteration, layer) for layer in layers]
        self._waiting[key] = (wanted, call)
        self._go_on([key], fence)

    def has_ended(self, iteration: int) -> bool:
        """Whether the iteration is over, so that there is nothing to wait for."""
        return iteration <= self._progress.completed

    def begin_iteration(self, iteration: int) -> None:
        """Layers are counted anew."""
        self._progress.begin_iteration(iteration)

    def layer_done(self, name: str, index: int, fence: object) -> None:
        """A layer of the current iteration was launched; ``fence`` lies behind it."""
        self._go_on(self._progress.layer_done(name, index), fence)

    def end_iteration(self, iteration: int, fence: object) -> None:
        """The iteration was launched, and every earlier one; ``fence`` lies behind it."""
        self._go_on(self._progress.end_iteration(iteration), fence)

    def _go_on(self, keys: Sequence[str], fence: object) -> None:
        for key in keys:
            wanted, call = self._waiting[key]
            while wanted and self._progress.holds(wanted[-1]):
                wanted.pop()
            if wanted:
                self._progress.wait(key, wanted[-1])
            else:
                del self._waiting[key]
                call(fence)


class _BehindLayers:
    """Threads that get a task when some layers are done; ``fence`` then lies behind these."""

    def __init__(self, control: Control, lanes: Lanes, iteration: int, layers: Sequence[str]) -> None:
        self._control = control
        self._lanes = lanes
        self._iteration = iteration
        self._layers = layers
        self.fence: object = None

    def put(self, priority: float, task: Callable[[], None]) -> None:
        """Queue ``task`` later."""

        def queue(fence: object) -> None:
            self.fence = fence
            self._lanes.put(priority, task)

        self._control.after_layers(self._iteration, self._layers, queue)


class LayerwiseStoreJob(StoreJob):
    """HBM to DRAM, each layer as soon as it is done."""

    def _gather(self) -> None:
        if not self._control.commit(self._op.op_id):
            self._finish(OpStatus.CANCELLED)
            return
        copier = self._layers()
        self._spread(
            [
                self._gather_band(copier, group, band, members)
                for group, members in self._by_group(range(len(self._op.blocks))).items()
                for band in range(copier.bands(group))
            ],
            self._gathered,
        )

    def _layers(self) -> LayerCopier:
        if self._tools.layers is None:
            raise StateError(f"op {self._op.op_id}: this engine's copier cannot copy single layers; store it whole")
        return self._tools.layers

    def _gather_band(self, copier: LayerCopier, group: int, band: int, members: Sequence[int]) -> Step:
        blocks = self._op.blocks
        lanes = _BehindLayers(
            self._control, self._tools.device, self._op.requirement.iteration, copier.band_layers(group, band)
        )

        def gather() -> None:
            if self._failed:
                return
            copy = functools.partial(
                copier.gather_band,
                group,
                band,
                [blocks[index].hbm_block for index in members],
                [blocks[index].dram_page for index in members],
                lanes.fence,
            )
            self._attempt(range(len(blocks)), DEVICE, copy)

        return lanes, gather
