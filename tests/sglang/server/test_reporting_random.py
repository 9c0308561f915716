"""Some hundred requests at random on a real server whose every level is too small; the master knows the truth.

Requests come several at once, with salts and extra keys, share beginnings, are broken off; caches are flushed, the
storage is cleared and attached anew, the master is killed.  What the server holds is asked through a door in its
scheduler, and compared hash by hash whenever the server has come to rest.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from examples.random_model import prompt
from examples.serving_sglang import PAGE_TOKENS, SglangServer, extra_config
from tests.connectors.reporting.at_master import DRAM, HBM, SSD, Held, known_at
from tests.connectors.waiting import eventually
from tests.master.app.master_process import MasterProcess
from tests.sglang.server import truths
from tests.sglang.server.servers import server
from tests.sglang.server.test_reporting import SOON, node_at
from tests.sglang.server.truths import Document, Truth
from umbp_connectors.prompt_hashes.hasher import PromptHasher
from umbp_connectors.prompt_hashes.tags import hasher_of, tag_values

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SEED = int(os.environ.get("TEST_SEED", "11"))
PAGE_BYTES = 128 << 10
L1_PAGES, L2_RATIO = 64, 1.25
L3 = {"dram_capacity": 40 * PAGE_BYTES, "ssd_capacity": 110 * PAGE_BYTES, "prefetch_threshold": 2 * PAGE_TOKENS}
SMALL = ("--max-total-tokens", str(L1_PAGES * PAGE_TOKENS), "--hicache-ratio", str(L2_RATIO))
WAVES, REST = 128, 8
"""So many waves of up to four requests; the server comes to rest after every eighth."""
OPERATIONS = {3: "attach_anew", 5: "flush", 7: "clear", 9: "flush"}
"""By the number of the rest at which they happen."""
KILLED = 6
"""Before this rest the master is killed, during it another one comes."""
MASTER = ("--listen=none", "--metadata-backend=none")


@dataclass
class Look:
    """One comparison: what the master knew, and what there was."""

    truth: Truth
    known: Held
    seconds: float
    """Until the master knew, from when the truth was told."""
    operation: str = ""
    """What was done to the caches right before."""


@dataclass
class Run:
    """What was done and seen."""

    done: Counter[str] = field(default_factory=Counter)
    looks: list[Look] = field(default_factory=list)
    storage_tokens: int = 0
    host_tokens: int = 0


def corpus(rng: random.Random) -> list[Document]:
    """Families of texts with common beginnings, each in several namespaces."""
    texts = []
    for seed in range(4):
        trunk = prompt(12 * PAGE_TOKENS, seed=700 + seed)
        for branch in range(3):
            kept = rng.randrange(2, 12) * PAGE_TOKENS
            texts.append(trunk[:kept] + prompt(rng.randrange(1, 5) * PAGE_TOKENS + 5, seed=800 + 10 * seed + branch))
    spaces = [{}, {}, {"cache_salt": "of a tenant"}, {"extra_key": "apart"}, {"extra_key": "x", "cache_salt": "y"}]
    return [Document(tuple(text), **rng.choice(spaces)) for text in texts for _ in range(2)]


class Life:
    """What clients and operators do to a server."""

    def __init__(self, running: SglangServer, doors: Path, pool: dict[str, object]) -> None:
        self.running, self.doors, self.pool = running, doors, pool
        self.random = random.Random(SEED)
        self.run = Run()
        self.texts = corpus(self.random)
        self.seen: dict[Document, None] = {}
        self.hasher: PromptHasher | None = None

    def wave(self) -> None:
        """Several requests at once."""
        chosen = self.random.choices(self.texts, k=self.random.randrange(1, 5))
        plans = [(each, self.random.randrange(1, 70), self.random.random() < 0.15) for each in chosen]
        with ThreadPoolExecutor(4) as clients:
            for document in clients.map(self._ask, *zip(*plans, strict=True)):
                self.seen[document] = None

    def _ask(self, document: Document, answer: int, breaks_off: bool) -> Document:
        """A request; what may be in the caches then."""
        if breaks_off:
            room = PAGE_TOKENS - 1 - len(document.tokens) % PAGE_TOKENS
            self._break_off(document, min(answer, room))  # what it goes on to compute fills no page
            return document
        done = self.running.complete(document.tokens, answer, **document.fields())
        self.run.done["answered"] += 1
        self.run.storage_tokens += done.storage
        self.run.host_tokens += done.host
        return Document((*document.tokens, *done.tokens), document.cache_salt, document.extra_key)

    def _break_off(self, document: Document, answer: int) -> None:
        sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
        body = {"input_ids": list(document.tokens), "sampling_params": sampling, "stream": True, **document.fields()}
        with closing(self.running.events("/generate", body)) as events:
            next(events)
        self.run.done["broken off"] += 1

    def flush(self) -> None:
        self.running.flush_cache()

    def clear(self) -> None:
        self.running.request("POST", "/hicache/storage-backend/clear", headers=self.running._authorization())

    def attach_anew(self) -> None:
        self.running.flush_cache()
        self.running.detach()
        self.running.attach(**self.pool)

    def operate(self, operation: str) -> None:
        """What an operator does now and then."""
        operations = {"flush": self.flush, "clear": self.clear, "attach_anew": self.attach_anew}
        if operation:
            operations[operation]()
            self.run.done[operation] += 1

    def look(self, master: MasterProcess, operation: str) -> None:
        """Compare, as soon as the server has come to rest."""
        node = node_at(master)
        assert node is not None
        self.hasher = self.hasher or hasher_of(tag_values(node.tags))
        truth = truths.ask(self.doors, list(self.seen), self.hasher)
        began = time.monotonic()
        eventually(lambda: known_at(master, node.node_id) == truth.held(), SOON)
        seconds = time.monotonic() - began
        self.run.looks.append(Look(truth, known_at(master, node.node_id), seconds, operation))


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    sys.stdout.write(f"TEST_SEED={SEED}\n")
    folder = tmp_path_factory.mktemp("random")
    with ExitStack() as stack:
        doors = stack.enter_context(truths.doors())
        master = stack.enter_context(MasterProcess(folder, *MASTER))
        door = master.doors["native"]
        pool = {**L3, "ssd_dir": str(folder / "ssd"), "master_address": f"umbp://{door}"}
        environment = truths.environment(doors)
        running = stack.enter_context(server(model, folder, *SMALL, *extra_config(**pool), environment=environment))
        assert eventually(lambda: node_at(master) is not None, SOON)
        life = Life(running, doors, pool)
        for number in range(WAVES // REST):
            if number == KILLED:
                master.end(signal.SIGKILL)
            for _ in range(REST):
                life.wave()
            operation = OPERATIONS.get(number, "")
            life.operate(operation)
            if number == KILLED:
                master = stack.enter_context(MasterProcess(folder, *MASTER, f"--native-listen={door}"))
                assert eventually(lambda: node_at(master) is not None, SOON)  # noqa: B023 - waits here
            life.look(master, operation)
        yield life.run


def test_the_master_knows_the_truth_whenever_the_server_rests(run: Run) -> None:
    assert len(run.looks) == WAVES // REST
    for number, look in enumerate(run.looks):
        wanted, tiers = look.truth.held(), (HBM, DRAM, SSD)
        missed = {tier: wanted.get(tier, set()) - look.known.get(tier, set()) for tier in tiers}
        believed = {tier: look.known.get(tier, set()) - wanted.get(tier, set()) for tier in tiers}
        assert not any((*missed.values(), *believed.values())), (f"TEST_SEED={SEED}, rest {number}", missed, believed)


def test_everything_happened_in_that_run(run: Run) -> None:
    assert run.done["answered"] > 200
    assert min(run.done[name] for name in ("broken off", "flush", "clear", "attach_anew")) > 0, run.done
    assert run.storage_tokens > 0
    assert run.host_tokens > 0


def test_every_level_was_too_small(run: Run) -> None:
    """L1, L2 and L3's DRAM evicted what the next level kept, SSD what nobody kept; nobody had asked them to."""
    pairs = zip(run.looks, run.looks[1:], strict=False)
    later = [(before.truth, after.truth) for before, after in pairs if not after.operation]
    assert any((before.device - after.device) & after.host for before, after in later), "left L1, is in L2"
    assert any((before.host - after.host) & after.pool["SSD"] for before, after in later), "left L2, is on SSD"
    assert any((before.pool["DRAM"] - after.pool["DRAM"]) & after.pool["SSD"] for before, after in later), "demoted"
    assert any(before.pool["SSD"] - after.pool["SSD"] - after.host for before, after in later), "left SSD"
    most = {tier: max(len(look.known.get(tier, ())) for look in run.looks) for tier in (HBM, DRAM, SSD)}
    assert most[HBM] <= L1_PAGES < most[DRAM]
    assert most[SSD] > 90
