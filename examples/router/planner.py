"""From a prompt to the ranking of the workers, through its hashes and the master's index."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.router.books import Books, Seat, Worker
from examples.router.costs import Decision, Offer, decide, on_all_ranks
from examples.router.settings import Policy, RouterSettings
from umbp_connectors.client.reader import MasterReader
from umbp_connectors.prompt_hashes.hasher import NO_NAMESPACE, CannotHash, Namespace, PromptHasher
from umbp_connectors.prompt_hashes.tags import hasher_of
from umbp_core.index_match import PrefixMatch, TierRun

_SCHEME = ("block", "hash", "hash_form", "hash_start", "hash_unit", "hash_every", "hash_keys")
"""Tags that decide how hashes are computed; seats that have the same share them."""
_CHARACTERS_PER_TOKEN = 4
"""A guess, for prompts whose tokens are not known."""

Scheme = tuple[str | None, ...]


class NoWorker(Exception):
    """Nobody serves this model now."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is known of a request.  ``tokens`` is ``None`` when they are not known; ``unknown`` says why."""

    model: str
    length: int
    """Bytes of the request."""
    tokens: Sequence[int] | None = None
    namespace: Namespace = NO_NAMESPACE
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision with the seats that it names.  ``cause`` is a label: empty when everything was known."""

    decision: Decision
    seats: Mapping[str, tuple[Worker, Seat]]
    cause: str = ""

    def places(self) -> list[tuple[Worker, Seat]]:
        """Where to try, the best first."""
        return [self.seats[estimate.offer.seat] for estimate in self.decision.ranking]


@dataclass(frozen=True, slots=True)
class _Held:
    """What nodes hold of a prompt, by their names: runs of blocks, and tokens per block."""

    runs: Mapping[str, tuple[Sequence[TierRun], int]]
    cause: str = ""
    note: str = ""


class Planner:
    """Decides; one loop's thread, with the hashing and the question to the master in another."""

    def __init__(self, books: Books, reader: MasterReader | None, settings: RouterSettings) -> None:
        self._books = books
        self._reader = reader
        self._settings = settings

    async def plan(self, prompt: Prompt) -> Plan:
        """Who should serve ``prompt``.  Raises ``NoWorker``; never for want of a master."""
        seats = {seat.name: (worker, seat) for worker, seat in self._books.candidates(prompt.model)}
        if not seats:
            raise NoWorker(f"no worker that answers serves {prompt.model or 'anything'}")
        held = await self._held(prompt, [seat for _, seat in seats.values()])
        tokens = prompt.length // _CHARACTERS_PER_TOKEN if prompt.tokens is None else len(prompt.tokens)
        offers = [self._offer(worker, seat, held.runs) for worker, seat in seats.values()]
        return Plan(decide(offers, tokens, held.note), seats, held.cause)

    async def _held(self, prompt: Prompt, seats: Sequence[Seat]) -> _Held:
        if self._settings.policy is not Policy.KV:
            return _Held({})
        if self._reader is None:
            return _Held({}, "no_master", "no master")
        if prompt.tokens is None:
            return _Held({}, "no_tokens", f"tokens unknown: {prompt.unknown}")
        schemes = {_scheme(seat): seat.tags for seat in seats if seat.node}
        if not schemes:
            return _Held({}, "no_nodes", "no worker is a node of the master")
        return await asyncio.to_thread(self._ask, self._reader, prompt, list(schemes.values()))

    def _ask(self, reader: MasterReader, prompt: Prompt, schemes: Sequence[Mapping[str, str]]) -> _Held:
        """Who holds the prompt, under the hashes of each scheme.  Any thread."""
        runs: dict[str, tuple[Sequence[TierRun], int]] = {}
        cause = note = ""
        for tags in schemes:
            try:
                hasher = hasher_of(tags, self._settings.hash_seed)
                hashes = hasher.hashes(prompt.tokens or (), prompt.namespace)
            except CannotHash as error:
                cause, note = "no_hashes", str(error)
                continue
            found = self._match(reader, hasher, hashes)
            if found is None:
                cause, note = "master_silent", "the master does not answer"
                break
            runs |= {match.node: (match.runs, hasher.block_tokens) for match in found}
        return _Held(runs, cause, note)

    def _match(self, reader: MasterReader, hasher: PromptHasher, hashes: Sequence[bytes]) -> list[PrefixMatch] | None:
        if not hashes:
            return []
        weights = self._books.speeds.weights(hasher.block_tokens)
        return reader.match_prefix(hashes, weights, self._settings.match_timeout)

    def _offer(self, worker: Worker, seat: Seat, held: Mapping[str, tuple[Sequence[TierRun], int]]) -> Offer:
        speeds = self._books.speeds
        if self._settings.policy is Policy.TURN:
            return Offer(seat.name, speeds)
        runs, block_tokens = held.get(seat.node, ((), 0)) if seat.node else ((), 0)
        others = [sum(run.length for run in held.get(node, ((), 0))[0]) for node in seat.others]
        return Offer(
            seat.name,
            speeds,
            queue_seconds=worker.queue_seconds(seat, speeds),
            outstanding=seat.outstanding,
            runs=on_all_ranks(runs, others),
            block_tokens=block_tokens,
        )


def _scheme(seat: Seat) -> Scheme:
    return tuple(seat.tags.get(name) for name in _SCHEME)
