"""A real server and a real master: what the master knows after everything that happens to either, hash by hash.

What must be where follows from the requests: SGLang keeps the whole pages of a prompt on the device and, since it
writes through, in the host pool; L3 has them in DRAM and, soon, on SSD.  Where it has to evict, its own word on each
request (``cached_tokens_details``) says what was left.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from examples import server_process
from examples.serving_sglang import PAGE_TOKENS, SglangServer, extra_config
from tests.connectors.reporting.at_master import DRAM, HBM, SSD, Held, known_at
from tests.connectors.waiting import eventually
from tests.master.app.master_process import CALL, MasterProcess
from tests.sglang.server import truths
from tests.sglang.server.servers import MAX_TOKENS, PAGES, prompts, server
from tests.sglang.server.truths import Document
from umbp_connectors.prompt_hashes.hasher import NO_NAMESPACE, Namespace
from umbp_connectors.prompt_hashes.tags import hasher_of, tag_values
from umbp_core.master.model import NodeInfo, NodeStatus

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FIRST = prompts(0, 2)
MORE = prompts(10, 10)
"""With the first ones, more than the device can hold."""
SALTED = prompts(50, 1)[0]
SALT = "of one tenant"
DEVICE_PAGES = 128
SOON = 20.0
"""Seconds within which the master has to know; it takes milliseconds, or two heartbeats after a failure."""


def node_at(master: MasterProcess) -> NodeInfo | None:
    """The only node that lives, by what the master knows."""
    with closing(master.native()) as client:
        nodes = [node for node in client.list_nodes(CALL) if node.status is NodeStatus.ALIVE]
    assert len(nodes) <= 1, nodes
    return nodes[0] if nodes else None


@dataclass
class Scene:
    """What the master knew at each stage, and what it should have known."""

    node: NodeInfo | None = None
    known: dict[str, Held] = field(default_factory=dict)
    wanted: dict[str, Held] = field(default_factory=dict)
    device: list[tuple[int, int]] = field(default_factory=list)
    storage: list[tuple[int, int]] = field(default_factory=list)
    """Of each later request the pages that the master knew, and those that SGLang found."""
    restarted: str = ""

    def look(self, stage: str, master: MasterProcess, wanted: Held) -> None:
        """Wait for what is wanted, and keep what there is."""
        self.wanted[stage] = {tier: pages for tier, pages in wanted.items() if pages}
        eventually(lambda: self.now(master) == self.wanted[stage], SOON)
        self.known[stage] = self.now(master)

    def now(self, master: MasterProcess) -> Held:
        found = node_at(master)
        return known_at(master, found.node_id) if found is not None else {}

    def ids(self, prompt: list[int], namespace: Namespace = NO_NAMESPACE) -> list[bytes]:
        """The ids of a prompt's pages, as a router computes them from what the node says of itself."""
        assert self.node is not None
        return hasher_of(tag_values(self.node.tags)).hashes(prompt, namespace)


def leading(ids: list[bytes], held: set[bytes]) -> int:
    """How many of ``ids`` from the first on are held."""
    return next((number for number, each in enumerate(ids) if each not in held), len(ids))


@pytest.fixture(scope="module")
def scene(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder, scene = tmp_path_factory.mktemp("reporting"), Scene()
    options = ("--listen=none", "--metadata-backend=none")
    first = MasterProcess(folder, *options, UMBP_HEARTBEAT_TTL_SEC="2")
    with first, truths.doors() as doors:
        door = first.doors["native"]
        pool = {
            "dram_capacity": "64MiB",
            "ssd_dir": str(folder / "ssd"),
            "ssd_capacity": "256MiB",
            "master_address": f"umbp://{door}",
        }
        with server(model, folder, *extra_config(**pool)) as running:
            live(scene, running, first)
            first.end(signal.SIGKILL)
            with MasterProcess(folder, *options, f"--native-listen={door}", UMBP_HEARTBEAT_TTL_SEC="2") as second:
                again(scene, running, second)
                running.kill()
                scene.look("killed", second, {})
                port = running.port
                with (
                    mock.patch.object(server_process, "free_port", return_value=port),
                    server(model, folder, *extra_config(**pool), environment=truths.environment(doors)) as restarted,
                ):
                    come_back(scene, restarted, second, doors)
        yield scene


def live(scene: Scene, running: SglangServer, master: MasterProcess) -> None:
    """Cold, mirrored, stored; flushed; back from L3."""
    assert eventually(lambda: node_at(master) is not None, SOON)
    scene.node = node_at(master)
    for each in FIRST:
        running.complete(each, MAX_TOKENS)
    running.complete(SALTED, MAX_TOKENS, cache_salt=SALT)
    pages = {*scene.ids(SALTED, Namespace(SALT)), *(page for each in FIRST for page in scene.ids(each))}
    scene.look("stored", master, {HBM: pages, DRAM: pages, SSD: pages})
    running.flush_cache()
    scene.look("flushed", master, {DRAM: pages, SSD: pages})
    running.complete(FIRST[0], MAX_TOKENS)
    running.complete(SALTED, MAX_TOKENS, cache_salt=SALT)
    back = {*scene.ids(FIRST[0]), *scene.ids(SALTED, Namespace(SALT))}
    scene.look("back", master, {HBM: back, DRAM: pages, SSD: pages})


def again(scene: Scene, running: SglangServer, master: MasterProcess) -> None:
    """The master was killed and is back; then the device has to evict."""
    scene.look("master back", master, scene.wanted["back"])
    for each in MORE:
        running.complete(each, MAX_TOKENS)
    stored = {page for each in [*FIRST, *MORE] for page in scene.ids(each)} | set(scene.ids(SALTED, Namespace(SALT)))
    eventually(lambda: scene.now(master).get(SSD) == stored, SOON)
    scene.known["evicted"] = scene.now(master)
    scene.wanted["evicted"] = {DRAM: stored, SSD: stored}
    for each in [*MORE[-3:], FIRST[0], *MORE[:2]]:
        known = leading(scene.ids(each), scene.now(master).get(HBM, set()))
        scene.device.append((known, running.complete(each, MAX_TOKENS).device // PAGE_TOKENS))
        eventually(lambda each=each: set(scene.ids(each)) <= scene.now(master)[HBM], SOON)


def come_back(scene: Scene, running: SglangServer, master: MasterProcess, doors: Path) -> None:
    """The server was killed and is back under its name, with what lies on its SSD."""
    assert eventually(lambda: bool(scene.now(master)), SOON)
    found = node_at(master)
    assert found is not None
    scene.restarted = found.node_id
    asked = [Document(tuple(each)) for each in [*FIRST, *MORE]]
    truth = truths.ask(doors, [*asked, Document(tuple(SALTED), SALT)], hasher_of(tag_values(found.tags)))
    assert not truth.device
    assert not truth.host
    scene.look("restarted", master, {SSD: truth.undescribed["SSD"]})
    for each in [FIRST[1], MORE[4]]:
        known = leading(scene.ids(each), scene.known["restarted"].get(SSD, set()))
        scene.storage.append((known, running.complete(each, MAX_TOKENS).storage // PAGE_TOKENS))


def test_the_node_says_who_it_is(scene: Scene) -> None:
    assert scene.node is not None
    tags = tag_values(scene.node.tags)
    assert scene.node.node_id == scene.restarted, "the same after a restart"
    assert scene.node.node_id.endswith(":dp0:pp0:tp0")
    host, _, port = tags["http"].partition(":")
    assert (host, f":{port}:" in scene.node.node_id) == ("127.0.0.1", True)
    assert (tags["engine"], tags["hash"], tags["block"], tags["model"]) == ("sglang", "sglang", "64", "random")


@pytest.mark.parametrize("stage", ["stored", "flushed", "back", "master back", "killed", "restarted"])
def test_the_master_knows_exactly_what_there_is(scene: Scene, stage: str) -> None:
    assert scene.known[stage] == scene.wanted[stage]


def test_there_was_something_to_know(scene: Scene) -> None:
    sizes = {stage: {tier: len(pages) for tier, pages in held.items()} for stage, held in scene.known.items()}
    assert sizes["stored"] == {HBM: 3 * PAGES, DRAM: 3 * PAGES, SSD: 3 * PAGES}
    assert sizes["back"] == {HBM: 2 * PAGES, DRAM: 3 * PAGES, SSD: 3 * PAGES}


def test_what_the_device_evicts_leaves_its_tier_alone(scene: Scene) -> None:
    known, wanted = scene.known["evicted"], scene.wanted["evicted"]
    assert known[SSD] == wanted[SSD]
    assert known[DRAM] == wanted[DRAM]
    assert known[HBM] < wanted[DRAM]
    assert len(known[HBM]) <= DEVICE_PAGES < len(wanted[DRAM])


def test_what_is_known_of_the_device_is_what_sglang_finds_there(scene: Scene) -> None:
    assert [known for known, _ in scene.device] == [found for _, found in scene.device]
    assert scene.device[0] == (PAGES, PAGES), "the last ones are still there"
    assert any(found < PAGES for _, found in scene.device), "others are not"


def test_what_a_killed_server_left_on_ssd_is_told_at_its_restart(scene: Scene) -> None:
    """Pages of the salted request have their storage's names, until somebody asks for them with the salt again."""
    known = scene.known["restarted"][SSD]
    salted = set(scene.ids(SALTED, Namespace(SALT)))
    assert known & scene.wanted["evicted"][SSD]
    assert not known & salted
    assert len(known - scene.wanted["evicted"][SSD]) <= len(salted)
    assert [known for known, _ in scene.storage] == [found for _, found in scene.storage]
    assert sum(found for _, found in scene.storage) > 0
