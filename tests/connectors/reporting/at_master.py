"""What a master knows of a node, asked for block by block, and an engine that tells it."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import closing

from tests.master.app.master_process import CALL, MasterProcess
from umbp_connectors.config import resolve
from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.words import Word, WordKind

HBM, DRAM, SSD = 1, 2, 3
PAGE = 4096

Held = dict[int, set[bytes]]


def known_at(master: MasterProcess, node_id: str) -> Held:
    """Every hash that ``master`` knows of the node, per tier; tiers without any are left out."""
    found: Held = {}
    with closing(master.native()) as client:
        for node in client.list_nodes(CALL):
            if node.node_id != node_id:
                continue
            for tier in node.external_counts:
                cursor = 0
                while True:
                    page = client.list_blocks(node_id, tier, cursor, PAGE, CALL)
                    found.setdefault(tier, set()).update(page.hashes)
                    cursor = page.cursor
                    if not cursor:
                        break
    return {tier: hashes for tier, hashes in found.items() if hashes}


def open_node(address: str, port: int = 8000, **keys: object) -> Reporter:
    """A reporter as an engine gets it, not started."""
    config = resolve({"master_address": address, **keys}, {}).config
    reporter = open_reporter(config, NodeFacts("vllm", "tiny", "0.32.0", "both", "127.0.0.1", port))
    assert reporter is not None
    return reporter


class Engine:
    """A GPU cache, and a pool over DRAM and SSD: blocks are computed, mirrored, demoted and evicted at random.

    ``truth`` is what the master should know.  One thread.
    """

    def __init__(self, reporter: Reporter, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.truth: Held = {HBM: set(), DRAM: set(), SSD: set()}
        self.gpu = reporter.feed("hbm", _decode, lambda: self._all(HBM))
        self.pool = reporter.feed("pool", _decode, lambda: self._all(DRAM, SSD))
        self.slowest = 0.0
        """Seconds that the longest ``tell`` took."""

    def held(self) -> Held:
        return {tier: set(hashes) for tier, hashes in self.truth.items() if hashes}

    def step(self) -> None:
        """One step of a scheduler."""
        new = [b"%d" % self.random.getrandbits(40) for _ in range(self.random.randrange(40))]
        self._tell(self.gpu, [self._add(HBM, new)])
        self._tell(self.pool, [self._add(DRAM, new)])
        old = self._some(DRAM, 20)
        self._tell(self.pool, [self._remove(DRAM, old), self._add(SSD, old)])
        if self.random.random() < 0.5:
            self._tell(self.gpu, [self._remove(HBM, self._some(HBM, 20))])
            self._tell(self.pool, [self._remove(SSD, self._some(SSD, 15))])

    def reset(self) -> None:
        """Forget what the GPU has."""
        self.truth[HBM] = set()
        self._tell(self.gpu, [Word(WordKind.CLEAR, HBM)])

    def _some(self, tier: int, most: int) -> list[bytes]:
        held = sorted(self.truth[tier])
        return self.random.sample(held, min(len(held), self.random.randrange(most)))

    def _add(self, tier: int, hashes: Sequence[bytes]) -> Word:
        self.truth[tier].update(hashes)
        return Word(WordKind.ADD, tier, hashes)

    def _remove(self, tier: int, hashes: Sequence[bytes]) -> Word:
        self.truth[tier].difference_update(hashes)
        return Word(WordKind.REMOVE, tier, hashes)

    def _all(self, *tiers: int) -> list[Word]:
        return [Word(WordKind.REPLACE, tier, list(self.truth[tier])) for tier in tiers]

    def _tell(self, feed: Feed[Sequence[Word]], words: list[Word]) -> None:
        began = time.perf_counter()
        feed.tell(sum(len(word.hashes) for word in words), words)
        self.slowest = max(self.slowest, time.perf_counter() - began)


def _decode(words: Sequence[Word]) -> Sequence[Word]:
    return words
