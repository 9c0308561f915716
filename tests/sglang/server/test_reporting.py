"""A real server and a real master: what the master knows after everything that happens to either, hash by hash.

What must be where follows from the requests: SGLang keeps the whole pages of a prompt on the device and, since it
writes through, in the host pool; L3 has them in DRAM and, soon, on SSD.  Where it has to evict, its own word on each
request (``cached_tokens_details``) says what was left.

The server has a publisher of its own beside our plug-in, which is followed by those who have nothing else: what they
tell the master of L1 and L2 is the same, though one of them loses every third batch.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from examples import server_process
from examples.serving_sglang import PAGE_TOKENS, SglangServer, extra_config
from tests.connectors.reporting.at_master import DRAM, HBM, SSD, Held, known_at
from tests.connectors.waiting import eventually
from tests.master.app.master_process import CALL, MasterProcess, running_umbp
from tests.sglang.server import streams, truths
from tests.sglang.server.servers import MAX_TOKENS, PAGES, prompts, server
from tests.sglang.server.truths import Document
from tests.vllm.models import tiny_lora
from umbp_connectors.prompt_hashes.hasher import NO_NAMESPACE, Namespace
from umbp_connectors.prompt_hashes.sglang import adapter_id
from umbp_connectors.prompt_hashes.tags import hasher_of, tag_values
from umbp_connectors.reporting.zmq_follower import FollowerStats
from umbp_core.master.model import NodeInfo, NodeStatus

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FIRST = prompts(0, 2)
MORE = prompts(10, 10)
"""With the first ones, more than the device can hold."""
SALTED = prompts(50, 1)[0]
SALT = "of one tenant"
ADAPTED = prompts(60, 1)[0]
ADAPTER = "poet"
FOLLOWED = "followed"
"""The node of ``umbp follow``."""
OTHERS = (FOLLOWED, streams.LOSSY)
DEVICE_PAGES = 128
STAGES = ("stored", "flushed", "back", "master back", "killed", "restarted")
SOON = 20.0
"""Seconds within which the master has to know; it takes milliseconds, or two heartbeats after a failure."""


def node_at(master: MasterProcess) -> NodeInfo | None:
    """The only node that lives, by what the master knows, beside those of followers."""
    with closing(master.native()) as client:
        infos = [node for node in client.list_nodes(CALL) if node.node_id not in OTHERS]
    nodes = [node for node in infos if node.status is NodeStatus.ALIVE]
    assert len(nodes) <= 1, nodes
    return nodes[0] if nodes else None


@dataclass
class Scene:
    """What the master knew at each stage, and what it should have known."""

    adapter: Path
    node: NodeInfo | None = None
    known: dict[str, Held] = field(default_factory=dict)
    wanted: dict[str, Held] = field(default_factory=dict)
    streamed: dict[str, dict[str, Held]] = field(default_factory=dict)
    """What it knew by each follower, and what L1 and L2 held then."""
    caches: dict[str, Held] = field(default_factory=dict)
    device: list[tuple[int, int]] = field(default_factory=list)
    storage: list[tuple[int, int]] = field(default_factory=list)
    """Of each later request the pages that the master knew, and those that SGLang found."""
    restarted: str = ""
    lossy: FollowerStats | None = None
    lost: int = 0

    def look(self, stage: str, master: MasterProcess, wanted: Held, caches: Held) -> None:
        """Wait for what is wanted, ``caches`` by those who follow the stream; and keep what there is."""
        self.wanted[stage] = {tier: pages for tier, pages in wanted.items() if pages}
        eventually(lambda: self.now(master) == self.wanted[stage], SOON)
        self.known[stage] = self.now(master)
        self.look_at_streams(stage, master, caches)

    def look_at_streams(self, stage: str, master: MasterProcess, caches: Held) -> None:
        def streamed() -> dict[str, Held]:
            return {name: known_at(master, name) for name in OTHERS}

        self.caches[stage] = caches
        eventually(lambda: all(held == caches for held in streamed().values()), SOON)
        self.streamed[stage] = streamed()

    def now(self, master: MasterProcess) -> Held:
        found = node_at(master)
        return known_at(master, found.node_id) if found is not None else {}

    def ids(self, prompt: list[int], namespace: Namespace = NO_NAMESPACE) -> list[bytes]:
        """The ids of a prompt's pages, as a router computes them from what the node says of itself."""
        assert self.node is not None
        return hasher_of(tag_values(self.node.tags)).hashes(prompt, namespace)

    def named(self) -> set[bytes]:
        """The pages that storage and stream call by different names."""
        adapted = self.ids(ADAPTED, Namespace(lora_name=ADAPTER, lora_path=str(self.adapter)))
        return {*self.ids(SALTED, Namespace(SALT)), *adapted}


def leading(ids: list[bytes], held: set[bytes]) -> int:
    """How many of ``ids`` from the first on are held."""
    return next((number for number, each in enumerate(ids) if each not in held), len(ids))


@pytest.fixture(scope="module")
def scene(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("reporting")
    scene, stream = Scene(tiny_lora(folder / ADAPTER)), streams.Stream()
    options = ("--listen=none", "--metadata-backend=none")
    with ExitStack() as stack:
        first = stack.enter_context(MasterProcess(folder, *options, UMBP_HEARTBEAT_TTL_SEC="2"))
        door = first.doors["native"]
        address = f"umbp://{door}"
        pool = {
            "dram_capacity": "64MiB",
            "ssd_dir": str(folder / "ssd"),
            "ssd_capacity": "256MiB",
            "master_address": address,
        }
        adapters = ("--lora-paths", f"{ADAPTER}={scene.adapter}", "--lora-backend", "torch_native")
        arguments = [*extra_config(**pool), *stream.arguments(), *adapters, "--max-loras-per-batch", "2"]
        running = stack.enter_context(server(model, folder, *arguments))
        follower, lossy = stack.enter_context(streams.losing(stream, address))
        begin(scene, running, first)
        places = (stream.endpoint, "--replay", stream.replay, "--http", "127.0.0.1:1", "--node-id", FOLLOWED)
        command = ("follow", "--master", address, "--engine", "sglang", "--grace", "0.5", *places)
        stack.enter_context(running_umbp(folder, *command))
        live(scene, running, first)
        first.end(signal.SIGKILL)
        options = (*options, f"--native-listen={door}")
        second = stack.enter_context(MasterProcess(folder, *options, UMBP_HEARTBEAT_TTL_SEC="2"))
        again(scene, running, second)
        scene.lossy, scene.lost = follower.stats(), lossy.lost
        running.kill()
        scene.look("killed", second, {}, {})
        doors = stack.enter_context(truths.doors())
        with (
            mock.patch.object(server_process, "free_port", return_value=running.port),
            server(model, folder, *arguments, environment=truths.environment(doors)) as restarted,
        ):
            come_back(scene, restarted, second, doors)
        yield scene


def begin(scene: Scene, running: SglangServer, master: MasterProcess) -> None:
    """Before ``umbp follow`` is there."""
    assert eventually(lambda: node_at(master) is not None, SOON)
    scene.node = node_at(master)
    for each in FIRST:
        running.complete(each, MAX_TOKENS)
    running.complete(SALTED, MAX_TOKENS, cache_salt=SALT)
    running.complete(ADAPTED, MAX_TOKENS, lora_path=ADAPTER)


def live(scene: Scene, running: SglangServer, master: MasterProcess) -> None:
    """Cold, mirrored, stored; flushed; back from L3."""
    pages = scene.named() | {page for each in FIRST for page in scene.ids(each)}
    scene.look("stored", master, {HBM: pages, DRAM: pages, SSD: pages}, {HBM: pages, DRAM: pages})
    running.flush_cache()
    scene.look("flushed", master, {DRAM: pages, SSD: pages}, {})
    running.complete(FIRST[0], MAX_TOKENS)
    running.complete(SALTED, MAX_TOKENS, cache_salt=SALT)
    running.complete(ADAPTED, MAX_TOKENS, lora_path=ADAPTER)
    back = scene.named() | set(scene.ids(FIRST[0]))
    scene.look("back", master, {HBM: back, DRAM: pages, SSD: pages}, {HBM: back, DRAM: back})


def again(scene: Scene, running: SglangServer, master: MasterProcess) -> None:
    """The master was killed and is back; then the device has to evict."""
    scene.look("master back", master, scene.wanted["back"], scene.caches["back"])
    for each in MORE:
        running.complete(each, MAX_TOKENS)
    stored = scene.named() | {page for each in [*FIRST, *MORE] for page in scene.ids(each)}
    eventually(lambda: scene.now(master).get(SSD) == stored, SOON)
    scene.known["evicted"] = scene.now(master)
    scene.wanted["evicted"] = {DRAM: stored, SSD: stored}
    in_host = stored - set(scene.ids(FIRST[1]))
    scene.look_at_streams("evicted", master, {HBM: scene.known["evicted"][HBM], DRAM: in_host})
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
    named = [Document(tuple(SALTED), SALT), Document(tuple(ADAPTED), None, adapter_id(ADAPTER, str(scene.adapter)))]
    truth = truths.ask(doors, [*asked, *named], hasher_of(tag_values(found.tags)))
    assert not truth.device
    assert not truth.host
    scene.look("restarted", master, {SSD: truth.undescribed["SSD"]}, {})
    for each in [FIRST[1], MORE[4]]:
        known = leading(scene.ids(each), scene.known["restarted"].get(SSD, set()))
        scene.storage.append((known, running.complete(each, MAX_TOKENS).storage // PAGE_TOKENS))
    there = leading(scene.ids(ADAPTED), truth.pool["SSD"])
    adapted = running.complete(ADAPTED, MAX_TOKENS, lora_path=ADAPTER)
    scene.storage.append((there, adapted.storage // PAGE_TOKENS))
    asked_again = {*scene.ids(FIRST[1]), *scene.ids(MORE[4]), *scene.named()} - set(scene.ids(SALTED, Namespace(SALT)))
    scene.look_at_streams("asked again", master, {HBM: asked_again, DRAM: asked_again})


def test_the_node_says_who_it_is(scene: Scene) -> None:
    assert scene.node is not None
    tags = tag_values(scene.node.tags)
    assert scene.node.node_id == scene.restarted, "the same after a restart"
    assert scene.node.node_id.endswith(":dp0:pp0:tp0")
    host, _, port = tags["http"].partition(":")
    assert (host, f":{port}:" in scene.node.node_id) == ("127.0.0.1", True)
    assert (tags["engine"], tags["hash"], tags["block"], tags["model"]) == ("sglang", "sglang", "64", "random")


@pytest.mark.parametrize("stage", STAGES)
def test_the_master_knows_exactly_what_there_is(scene: Scene, stage: str) -> None:
    assert scene.known[stage] == scene.wanted[stage]


@pytest.mark.parametrize("stage", [*STAGES, "evicted", "asked again"])
@pytest.mark.parametrize("follower", OTHERS)
def test_the_stream_says_the_same_of_the_caches(scene: Scene, follower: str, stage: str) -> None:
    assert scene.streamed[stage][follower] == scene.caches[stage]


def test_what_the_stream_lost_was_repeated(scene: Scene) -> None:
    assert scene.lossy is not None
    assert scene.lost > 0
    assert scene.lossy.replays > 1
    assert (scene.lossy.missed, scene.lossy.cleared) == (0, {})


def test_there_was_something_to_know(scene: Scene) -> None:
    sizes = {stage: {tier: len(pages) for tier, pages in held.items()} for stage, held in scene.known.items()}
    assert sizes["stored"] == {HBM: 4 * PAGES, DRAM: 4 * PAGES, SSD: 4 * PAGES}
    assert sizes["back"] == {HBM: 3 * PAGES, DRAM: 4 * PAGES, SSD: 4 * PAGES}


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
    """Pages with a salt or an adapter have their storage's names, until somebody asks for them with it again."""
    known = scene.known["restarted"][SSD]
    assert known & scene.wanted["evicted"][SSD]
    assert not known & scene.named()
    assert len(known - scene.wanted["evicted"][SSD]) <= len(scene.named())
    assert [known for known, _ in scene.storage] == [found for _, found in scene.storage]
    assert sum(found for _, found in scene.storage) > 0
