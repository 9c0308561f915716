"""A group of nodes, played: sessions that share prompts and documents, and nodes with an LRU cache on two tiers.

What comes out is what an index of such a group holds, what is asked, and how much changes per block computed.  Only
ratios are used further on, so a group that is smaller than a real one, with smaller caches, will do.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

HBM, DRAM = 1, 2


@dataclass(frozen=True, slots=True)
class Workload:
    """Who asks for what.  Lengths are in blocks; a popularity is the exponent of Zipf's law."""

    nodes: int = 96
    hbm_blocks: int = 2000
    """Blocks that a node keeps in HBM; each tier forgets what was not used for longest, the end of a chain first."""
    dram_blocks: int = 8000
    turns: int = 20_000
    prompts: int = 200
    prompt_zipf: float = 1.1
    prompt_blocks: int = 40
    documents: int = 50
    """Documents per prompt."""
    document_zipf: float = 0.9
    document_blocks: int = 60
    turn_blocks: int = 25
    """Blocks that a turn adds, question and answer."""
    turns_of_session: int = 6
    affinity: float = 0.85
    """How often a turn goes where its session, or the last one with its document, was; else anywhere."""
    seed: int = 1


class Cache:
    """The blocks of one tier of one node, least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.blocks: dict[int, None] = {}
        self.reported = 0
        self.revoked = 0
        self._capacity = capacity

    def use(self, chain: Sequence[int]) -> None:
        """All of ``chain`` was used; its last block is the first of them to go."""
        blocks = self.blocks
        before = len(blocks)
        known = sum(map(blocks.__contains__, chain))
        for block in reversed(chain):
            blocks.pop(block, None)
            blocks[block] = None
        self.reported += len(chain) - known
        surplus = before + len(chain) - known - self._capacity
        if surplus > 0:
            self.revoked += surplus
            for block in list(itertools.islice(blocks, surplus)):
                del blocks[block]


@dataclass(slots=True)
class Session:
    """A conversation: what has been said so far, where it was served last, how often it goes on."""

    chain: list[int]
    node: int
    left: int


@dataclass(slots=True)
class Group:
    """The nodes after the last turn."""

    caches: list[dict[int, Cache]]
    queries: list[list[int]]
    """Chains that were asked for during the last third of the turns, before they were computed."""
    computed: int = 0
    """Blocks that had to be computed, in the same time."""
    asked: int = 0
    """Blocks of the queries."""
    changes: int = 0
    """Blocks reported and revoked, in the same time."""
    holders: dict[int, int] = field(default_factory=dict)
    """Block to a mask over the nodes that hold it on any tier."""

    def entries(self) -> Iterator[tuple[int, int, list[bytes]]]:
        """Node, tier and hashes of every tier of every node; hashes in the order in which they were computed."""
        for node, tiers in enumerate(self.caches):
            for tier, cache in tiers.items():
                yield node, tier, [hash_of(block) for block in sorted(cache.blocks)]


def hash_of(block: int) -> bytes:
    """A hash as engines publish it: decimal, 19 digits, scattered."""
    return b"%019d" % (block * 6364136223846793005 % 10**19)


def play(workload: Workload) -> Group:
    """Serve all turns of ``workload``."""
    player = _Player(workload)
    for turn in range(workload.turns):
        player.serve(count=turn >= workload.turns * 2 // 3)
    group = player.group
    for node, tiers in enumerate(group.caches):
        for block in tiers[HBM].blocks.keys() | tiers[DRAM].blocks.keys():
            group.holders[block] = group.holders.get(block, 0) | 1 << node
    return group


class _Player:
    """The state of a play."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._random = random.Random(workload.seed)
        self._blocks = itertools.count(1)
        self._prompts = [self._fresh(workload.prompt_blocks) for _ in range(workload.prompts)]
        self._documents: dict[tuple[int, int], list[int]] = {}
        self._served: dict[tuple[int, int], int] = {}
        self._sessions: list[Session] = []
        self._prompt_odds = _zipf(workload.prompts, workload.prompt_zipf)
        self._document_odds = _zipf(workload.documents, workload.document_zipf)
        sizes = {HBM: workload.hbm_blocks, DRAM: workload.dram_blocks}
        self.group = Group([{tier: Cache(size) for tier, size in sizes.items()} for _ in range(workload.nodes)], [])

    def serve(self, count: bool) -> None:
        """One turn of a session that goes on, or of a new one."""
        number = self._random.randrange(self._workload.nodes * 2)
        if number < len(self._sessions):
            session = self._sessions[number]
        else:
            session = self._open()
            self._sessions.append(session)
        group, caches = self.group, self.group.caches[session.node]
        session.chain += self._fresh(self._workload.turn_blocks)
        before = sum(cache.reported + cache.revoked for cache in caches.values())
        if count:
            held = caches[HBM].blocks.keys() | caches[DRAM].blocks.keys()
            group.queries.append(list(session.chain))
            group.asked += len(session.chain)
            group.computed += len(session.chain) - _prefix(session.chain, held)
        for cache in caches.values():
            cache.use(session.chain)
        if count:
            group.changes += sum(cache.reported + cache.revoked for cache in caches.values()) - before
        self._go_on(session)

    def _go_on(self, session: Session) -> None:
        session.left -= 1
        if session.left <= 0:
            self._sessions.remove(session)
        elif self._random.random() > self._workload.affinity:
            session.node = self._random.randrange(self._workload.nodes)

    def _open(self) -> Session:
        workload, choose = self._workload, self._random
        prompt = bisect.bisect(self._prompt_odds, choose.random())
        document = bisect.bisect(self._document_odds, choose.random())
        name = (prompt, document)
        if name not in self._documents:
            self._documents[name] = self._fresh(workload.document_blocks)
        node = self._served.get(name, -1)
        if node < 0 or choose.random() > workload.affinity:
            node = choose.randrange(workload.nodes)
        self._served[name] = node
        turns = 1 + int(choose.expovariate(1 / workload.turns_of_session))
        return Session(self._prompts[prompt] + self._documents[name], node, turns)

    def _fresh(self, mean: int) -> list[int]:
        """New blocks; half as many to twice as many as ``mean``, skewed to the short."""
        count = max(1, int(mean * self._random.lognormvariate(-0.125, 0.5)))
        return list(itertools.islice(self._blocks, count))


def _zipf(count: int, exponent: float) -> list[float]:
    """Cumulated odds of ``count`` things."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    total = sum(weights)
    return [part / total for part in itertools.accumulate(weights[:-1])]


def _prefix(chain: Sequence[int], held: set[int]) -> int:
    return next((position for position, block in enumerate(chain) if block not in held), len(chain))
