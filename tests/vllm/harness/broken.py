"""Connectors with one defect each, so that every check of the harness is known to catch what it is for."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from tests.vllm.harness.dict_connector import DictConnector, DictLeader, DictWorker, Op, Tracked

MODULE = "tests.vllm.harness.broken"


class _WrongBlockWorker(DictWorker):
    def run(self, op: Op) -> None:
        if op.load:
            keys, blocks = zip(*op.copies, strict=True)
            op = Op(op.op_id, op.request_id, True, tuple(zip(keys, reversed(blocks), strict=True)))
        super().run(op)


class WrongBlock(DictConnector):
    """Loads the first object of an op into its last block and so on."""

    worker_class = _WrongBlockWorker


class _StaleLocalHitLeader(DictLeader):
    def allocated(self, request: Any, blocks: tuple[list[int], ...], count: int) -> None:
        self.requests[request.request_id].local_hit = self.first_hits[request.request_id]
        super().allocated(request, blocks, count)

    def match(self, request: Any, computed: int) -> tuple[int, bool]:
        self.first_hits.setdefault(request.request_id, computed)
        return super().match(request, computed)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.first_hits: dict[str, int] = {}


class StaleLocalHit(DictConnector):
    """Positions of a load count from the first match although the local hit grew since (bug B2)."""

    leader_class = _StaleLocalHitLeader


class _AppendsBlocksLeader(DictLeader):
    def take_table(self, tracked: Tracked, table: tuple[list[int], ...]) -> None:
        tracked.blocks = [old + list(new) for old, new in zip(tracked.blocks or ([], []), table, strict=False)]


class AppendsBlocks(DictConnector):
    """Appends the full block list at every allocation (bug B3)."""

    leader_class = _AppendsBlocksLeader


class _FreesEarlyLeader(DictLeader):
    def finished(self, request_id: str) -> bool:
        self.requests.pop(request_id, None)
        return False


class FreesEarly(DictConnector):
    """Lets the engine free and reuse blocks that its stores still read."""

    leader_class = _FreesEarlyLeader

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Does not look at what is overwritten."""


class IgnoresPreemption(DictConnector):
    """Delays frees at finish, but reads the blocks of a preempted request after they were reused."""

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Does not look at what is overwritten."""


class StoresBeforeForward(DictConnector):
    """Reads the blocks of a step before the step wrote them."""

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        super().handle_preemptions(kv_connector_metadata)
        for op in kv_connector_metadata.stores:
            self.worker.run(op)
        kv_connector_metadata.stores.clear()


class _ReportsLoadsTwiceWorker(DictWorker):
    def results(self, asynchronous: bool) -> KVConnectorTransferResults:
        results = super().results(asynchronous)
        again, self.again = self.again, set(results.finished_recving)
        results.finished_recving |= again
        return results

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.again: set[str] = set()


class ReportsLoadsTwice(DictConnector):
    """Says twice that a load has arrived."""

    worker_class = _ReportsLoadsTwiceWorker


class ReportsUnknownRequest(DictConnector):
    """Says that a request was sent whose blocks it never took over."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        results.finished_sending |= finished_req_ids
        return results


class ForgetsSent(DictConnector):
    """Takes over blocks and never gives them back."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        results.finished_sending.clear()
        return results


class ForgetsReceived(DictConnector):
    """Loads, and does not say so."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        results.finished_recving.clear()
        return results


class _LosesStoresWorker(DictWorker):
    loses = False

    def run(self, op: Op) -> None:
        if not op.load and self.loses:
            self.done[op.op_id] += 1
            return
        if op.load:
            op = Op(op.op_id, op.request_id, True, tuple(copy for copy in op.copies if copy[0] in self.objects))
        super().run(op)


class PublishesFailedStores(DictConnector):
    """Publishes a block although the second rank failed to store it (bug B1)."""

    worker_class = _LosesStoresWorker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        self.worker.loses = self._vllm_config.parallel_config.rank == 1


class _IgnoresSaltLeader(DictLeader):
    def key(self, request: Any, group: int, block: int) -> tuple[bytes, int]:
        end = (block + 1) * self.groups[group].block_size
        return repr(list(request.all_token_ids[:end])).encode(), group


class IgnoresSalt(DictConnector):
    """Keys its objects by tokens alone."""

    leader_class = _IgnoresSaltLeader


class _HidesFailureWorker(DictWorker):
    def fail(self, op: Op, block: int) -> None:
        """Tells nobody."""


class HidesFailure(DictConnector):
    """Reports a failed load as arrived."""

    worker_class = _HidesFailureWorker


class _BlockErrorsOfManyGroupsWorker(DictWorker):
    def fail(self, op: Op, block: int) -> None:
        self.invalid.add(block)


class BlockErrorsOfManyGroups(DictConnector):
    """Names blocks in a model whose groups share block numbers."""

    worker_class = _BlockErrorsOfManyGroupsWorker


ALL = (
    WrongBlock,
    StaleLocalHit,
    AppendsBlocks,
    FreesEarly,
    IgnoresPreemption,
    StoresBeforeForward,
    ReportsLoadsTwice,
    ReportsUnknownRequest,
    ForgetsSent,
    ForgetsReceived,
    PublishesFailedStores,
    IgnoresSalt,
    HidesFailure,
    BlockErrorsOfManyGroups,
)


def register() -> None:
    """Make the correct connector (``dict``) and the broken ones (by class name) known to vLLM; idempotent."""
    known = KVConnectorFactory._registry
    if "dict" not in known:
        KVConnectorFactory.register_connector("dict", "tests.vllm.harness.dict_connector", "DictConnector")
    for broken in ALL:
        if broken.__name__ not in known:
            KVConnectorFactory.register_connector(broken.__name__, MODULE, broken.__name__)
