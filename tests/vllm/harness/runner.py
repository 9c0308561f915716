"""What a model runner keeps between steps, rebuilt from scheduler outputs alone, and one forward pass from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec
from vllm.v1.outputs import DraftTokenIds

from tests.vllm.harness.model import Prefix, States, mix, next_token
from tests.vllm.harness.rank import SimulatedRank
from tests.vllm.harness.spec import VOCABULARY


@dataclass
class RunnerRequest:
    """One request as the worker knows it."""

    prefix: Prefix
    prompt_length: int
    blocks: list[list[int]]
    computed: int = 0


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request in one step: positions ``[start, end)``, the last ones possibly drafts."""

    request_id: str
    start: int
    end: int
    prefix: Prefix
    blocks: list[list[int]]
    drafts: tuple[int, ...]

    @property
    def known_end(self) -> int:
        """End of the positions whose tokens are no guesses."""
        return self.end - len(self.drafts)


@dataclass(frozen=True)
class Mismatch:
    """A position whose KV a forward pass read and that is not the model's."""

    rank: int
    layer: str
    group: int
    request_id: str
    position: int
    block: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank}, {self.layer} (group {self.group}): request {self.request_id} read wrong KV at"
            f" position {self.position} in block {self.block}"
        )


@dataclass
class _Positions:
    """Positions of many requests in one group, flattened."""

    blocks: list[npt.NDArray[np.int64]] = field(default_factory=list)
    offsets: list[npt.NDArray[np.int64]] = field(default_factory=list)
    states: list[States] = field(default_factory=list)
    owners: list[tuple[int, str, int]] = field(default_factory=list)
    """(first flat index, request, first position)."""
    count: int = 0

    def add(self, chunk: Chunk, start: int, end: int, group: int, block_size: int) -> None:
        if start >= end:
            return
        positions = np.arange(start, end)
        table = np.array(chunk.blocks[group], dtype=np.int64)
        self.blocks.append(table[positions // block_size])
        self.offsets.append(positions % block_size)
        self.states.append(chunk.prefix.slice(start, end))
        self.owners.append((self.count, chunk.request_id, start))
        self.count += end - start

    def flat(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], States]:
        return np.concatenate(self.blocks), np.concatenate(self.offsets), np.concatenate(self.states)

    def owner_of(self, index: int) -> tuple[str, int]:
        first, request_id, start = max(owner for owner in self.owners if owner[0] <= index)
        return request_id, start + index - first


def _first_read(spec: KVCacheSpec, start: int) -> int:
    """The first position that attention still sees from position ``start`` on."""
    if isinstance(spec, SlidingWindowSpec):
        return max(0, start - spec.sliding_window + 1)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return start // spec.attention_chunk_size * spec.attention_chunk_size
    return 0


class Forward:
    """One forward pass: for every layer, write the new positions, then read all positions attention reads.

    The order within a layer is the real one: a request may hit, in the same step, blocks which another
    request of that step computes.
    """

    def __init__(self, chunks: list[Chunk], config: KVCacheConfig) -> None:
        self.chunks = chunks
        self.mismatches: list[Mismatch] = []
        self._reads: list[_Positions] = []
        self._writes: list[_Positions] = []
        for group, group_spec in enumerate(config.kv_cache_groups):
            spec = group_spec.kv_cache_spec
            reads, writes = _Positions(), _Positions()
            for chunk in chunks:
                reads.add(chunk, _first_read(spec, chunk.start), chunk.start, group, spec.block_size)
                writes.add(chunk, chunk.start, chunk.end, group, spec.block_size)
            self._reads.append(reads)
            self._writes.append(writes)

    def run(self, rank: SimulatedRank) -> None:
        """The pass on one rank; what does not match is collected, because a failed load may excuse it."""
        if not self.chunks:
            return
        for layer in rank.layers:
            rank.connector.wait_for_layer_load(layer.name)
            writes, reads = self._writes[layer.group], self._reads[layer.group]
            if writes.count:
                layer.write(*writes.flat())
            if reads.count:
                blocks, offsets, states = reads.flat()
                for index in layer.mismatches(blocks, offsets, states).tolist():
                    request_id, position = reads.owner_of(index)
                    self.mismatches.append(
                        Mismatch(rank.rank, layer.name, layer.group, request_id, position, int(blocks[index]))
                    )
            rank.connector.save_kv_layer(layer.name, rank.views[layer.name], None)


class ModelRunner:
    """State of all requests on the worker side; one for all ranks, because their states are equal."""

    def __init__(self, v2_runner: bool, draft_tokens: int) -> None:
        self.requests: dict[str, RunnerRequest] = {}
        self.starts: dict[str, Prefix] = {}
        """Request -> an empty prefix with its extra keys; these reach a real runner with the request."""
        self._v2 = v2_runner
        self._draft_tokens = draft_tokens

    def begin(self, output: SchedulerOutput) -> list[Chunk]:
        """Take over a scheduler output; the work it asks for."""
        for request_id in output.finished_req_ids:
            self.requests.pop(request_id, None)
        if self._v2:
            for request_id in output.preempted_req_ids or ():
                self.requests.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self._add(new)
        self._update(output.scheduled_cached_reqs)
        return [self._chunk(request_id, count, output) for request_id, count in output.num_scheduled_tokens.items()]

    def _add(self, new: NewRequestData) -> None:
        if new.req_id in self.requests:
            raise AssertionError(f"request {new.req_id} was scheduled as new although this runner holds it")
        prompt = list(new.prompt_token_ids or ())
        tokens = list(new.prefill_token_ids or ()) if self._v2 else prompt
        prefix = self.starts[new.req_id].copy()
        prefix.extend(tokens)
        blocks = [list(group) for group in new.block_ids]
        self.requests[new.req_id] = RunnerRequest(prefix, len(prompt), blocks, new.num_computed_tokens)

    def _update(self, cached: CachedRequestData) -> None:
        for index, request_id in enumerate(cached.req_ids):
            request = self.requests[request_id]
            new_blocks = cached.new_block_ids[index]
            request.computed = cached.num_computed_tokens[index]
            if request_id in cached.resumed_req_ids:
                request.prefix.truncate(0)
                request.prefix.extend(cached.all_token_ids[request_id])
                request.blocks = [list(group) for group in new_blocks or ()]
                continue
            # Output tokens that the scheduler discarded (a synchronous load failed) are forgotten here too.
            request.prefix.truncate(request.prompt_length + cached.num_output_tokens[index])
            for table, added in zip(request.blocks, new_blocks or (), strict=False):
                table.extend(added)

    def _chunk(self, request_id: str, count: int, output: SchedulerOutput) -> Chunk:
        request = self.requests[request_id]
        drafts = tuple(output.scheduled_spec_decode_tokens.get(request_id, ()))
        prefix = request.prefix.copy()
        prefix.extend(drafts)
        chunk = Chunk(request_id, request.computed, request.computed + count, prefix, request.blocks, drafts)
        if chunk.end > len(prefix.tokens):
            raise AssertionError(f"request {request_id}: {chunk.end} positions scheduled, {len(prefix.tokens)} known")
        return chunk

    def sample(self, chunks: list[Chunk]) -> list[list[int]]:
        """The tokens each chunk gives: none inside a prompt, else the accepted drafts and one more."""
        return [self._sample(chunk) for chunk in chunks]

    def _sample(self, chunk: Chunk) -> list[int]:
        own = self.requests[chunk.request_id].prefix
        if chunk.known_end < len(own.tokens):
            return []
        sampled: list[int] = []
        for draft in (*chunk.drafts, None):
            token = next_token(own.states[-1])
            sampled.append(token)
            own.extend([token])
            if token != draft:
                break
        return sampled

    def draft(self, chunks: list[Chunk]) -> DraftTokenIds:
        """Guesses for the next step, of which about a third are wrong."""
        drafts = []
        for chunk in chunks:
            guess = self.requests[chunk.request_id].prefix.copy()
            tokens = []
            for number in range(self._draft_tokens):
                token = next_token(guess.states[-1])
                if mix(guess.states[-1] + number) % 3 == 0:
                    token = (token + 1) % VOCABULARY
                tokens.append(token)
                guess.extend([token])
            drafts.append(tokens)
        return DraftTokenIds([chunk.request_id for chunk in chunks], drafts)
