"""The router in front of real servers, two SGLangs and then an SGLang and a vLLM; and ``umbp why`` before an SGLang.

Servers take half a minute each.  So everything happens in one scene, which keeps the answers; the tests look at these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from examples import server_process
from examples.random_model import prompt
from examples.router_cluster import ROOT, MasterServer, Routed, RouterServer, wait_until_seated
from examples.server_process import EngineServer
from examples.serving import VllmServer, cpu_environment
from examples.serving_sglang import PAGE_TOKENS, SglangAnswer, SglangServer, extra_config
from tests.connectors.waiting import eventually
from tests.master.app.test_cli_ask import in_process
from tests.sglang.server.servers import PAGES, VLLM_PYTHON, needs_vllm, server, vllm_environment
from umbp_connectors.client.reader import MasterReader
from umbp_connectors.client.settings import ClientSettings
from umbp_connectors.prompt_hashes.tags import hasher_of, tag_values
from umbp_core.tiers import Tier

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WHOLE = PAGES * PAGE_TOKENS
FULL = 320
"""Tokens in the full blocks of a prompt of 340, for pages of 64 and for blocks of 32."""
MORE = 40
FLAGS = ("--tokenize-timeout", "60", "--match-timeout", "30", "--refresh-interval", "0.5")
CALL = 60.0
SOON = 60.0
LONG = prompt(WHOLE + 10, seed=1)
EXACT = prompt(WHOLE, seed=2)
BRANCH = LONG[: 7 * PAGE_TOKENS] + prompt(300, seed=3)
SHORT = prompt(3 * PAGE_TOKENS + 10, seed=4)
TEXT = "The same words, and again the same words. " * 9
VLLM = (
    *("--kv-connector", "umbp", "--kv-transfer-config.kv_connector_extra_config.dram_capacity", "64MiB"),
    *("--enforce-eager", "--dtype", "float32", "--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "8"),
    "--enable-prompt-tokens-details",
)


@dataclass
class Foretold:
    """What ``umbp why`` said of a prompt, and what the engine then did."""

    said: dict[str, Any]
    answer: SglangAnswer

    @property
    def blocks(self) -> list[tuple[str, str | None]]:
        return [(block["verdict"], block["source"]) for block in self.said["blocks"]]


@dataclass
class Scene:
    """What happened."""

    workers: dict[str, str] = field(default_factory=dict)
    routed: dict[str, list[Routed]] = field(default_factory=dict)
    why: dict[str, Foretold] = field(default_factory=dict)


def url(worker: EngineServer) -> str:
    return f"http://127.0.0.1:{worker.port}"


class Cluster:
    """A master, a router, and servers that come and go."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.scene = model, folder, Scene()
        self.master = MasterServer(model, folder / "master.log")
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.router = RouterServer(model, folder / "router.log", (), {"PYTHONPATH": paths})
        self.reader: MasterReader | None = None

    def open(self, stack: ExitStack) -> None:
        stack.enter_context(self.master)
        self.router.arguments = ("--master", self.master.address, *FLAGS)
        self.reader = MasterReader(self.master.address, settings=ClientSettings(query_timeout=CALL))
        stack.callback(self.reader.close)

    def sglang(self, name: str) -> SglangServer:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        pool = {"dram_capacity": "64MiB", "ssd_dir": str(folder / "ssd"), "ssd_capacity": "256MiB"}
        pool["master_address"] = self.master.address
        return server(self.model, folder, *extra_config(**pool), "--max-total-tokens", "4096")

    def vllm(self) -> VllmServer:
        known = {**cpu_environment(), **vllm_environment(), "UMBP_MASTER_ADDRESS": self.master.address}
        return VllmServer(self.model, self.folder / "vllm.log", VLLM, known, VLLM_PYTHON)

    def ask(self, stage: str, prompts: Sequence[Sequence[int] | str], **settings: Any) -> None:
        self.scene.routed[stage] = [self.router.complete(each, **settings) for each in prompts]

    def knows(self, tokens: Sequence[int], worker: str, tier: Tier = Tier.HBM, gone: bool = False) -> None:
        """Wait until the master knows that ``worker`` has all full blocks of ``tokens`` on ``tier``, or none."""

        def holds() -> bool:
            held, count = self.held(tokens, worker, tier)
            return held == (0 if gone else count)

        assert eventually(holds, SOON)

    def held(self, tokens: Sequence[int], worker: str, tier: Tier) -> tuple[int, int]:
        """How many blocks from the first on the master knows there, and how many there are."""
        assert self.reader is not None
        (info,) = [each for each in self.reader.nodes() or () if f"http={worker.removeprefix('http://')}" in each.tags]
        hashes = hasher_of(tag_values(info.tags)).hashes(tokens)
        found = self.reader.match_prefix(hashes, {tier: 1.0}, timeout=CALL) or []
        return next((match.length for match in found if match.node == info.node_id), 0), len(hashes)

    def foretell(self, stage: str, worker: SglangServer, tokens: Sequence[int]) -> None:
        """What ``umbp why`` says, then what the engine does."""
        file = self.folder / "prompt.json"
        file.write_text(json.dumps(tokens))
        command = ("why", "--json", "--prompt-file", str(file), "--engine", url(worker), "--timeout", "60")
        code, out, err = in_process(*command, "--master", self.master.address)
        assert (code, err) == (0, "")
        self.scene.why[stage] = Foretold(json.loads(out), worker.complete(tokens, max_tokens=2))


@pytest.fixture(scope="module")
def scene(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    cluster = Cluster(model, tmp_path_factory.mktemp("router"))
    with ExitStack() as stack:
        cluster.open(stack)
        one, two = cluster.sglang("one"), cluster.sglang("two")
        start(stack, one, two)
        cluster.scene.workers = {"one": url(one), "two": url(two)}
        stack.enter_context(cluster.router)  # it is ready when somebody answers
        wait_until_seated(cluster.router, 2)
        conversations(cluster, "two SGLangs", 510)
        texts(cluster, one, two)
        life(cluster, one)
        one.stop()
        cluster.ask("the other one is left", [LONG])
        two.kill()
        third = restarted(cluster, stack, one)
        cluster.foretell("restarted", one, LONG)
        cluster.foretell("restarted, short", one, SHORT)
        if third is not None:
            cluster.scene.workers["vllm"] = url(third)
            wait_until_seated(cluster.router, 2)
            conversations(cluster, "an SGLang and a vLLM", 610)
        yield cluster.scene


def start(stack: ExitStack, *servers: EngineServer) -> None:
    """All at once."""
    for each in servers:
        stack.callback(each.stop)
    with ThreadPoolExecutor(len(servers)) as starters:
        list(starters.map(lambda each: each.start(), servers))


def restarted(cluster: Cluster, stack: ExitStack, one: SglangServer) -> VllmServer | None:
    """The first server is back on its port; a vLLM beside it, where there is one."""
    third = cluster.vllm() if VLLM_PYTHON else None
    with (
        mock.patch.object(server_process, "free_port", side_effect=[one.port, server_process.free_port()]),
        ThreadPoolExecutor(1) as starter,
    ):
        begun = starter.submit(one.start)
        assert eventually(lambda: one.process is not None, SOON)
        if third is not None:
            start(stack, third)
        begun.result()
    return third


def conversations(cluster: Cluster, stage: str, seed: int) -> None:
    """First turns, and second ones when the master knows what the first ones left."""
    prompts = [prompt(FULL + 20, seed=seed + number) for number in range(4)]
    cluster.ask(f"{stage}, first", prompts)
    for each, answer in zip(prompts, cluster.scene.routed[f"{stage}, first"], strict=True):
        cluster.knows(each, answer.worker)
    cluster.ask(f"{stage}, second", [[*each, *range(MORE)] for each in prompts])


def texts(cluster: Cluster, *workers: SglangServer) -> None:
    """Words; then a prompt whose KV has left the device for L3."""
    cluster.ask("text", [TEXT])
    (answer,) = cluster.scene.routed["text"]
    (holder,) = [worker for worker in workers if url(worker) == answer.worker]
    tokens = holder.post("/tokenize", {"prompt": TEXT})["tokens"]
    cluster.knows(tokens, answer.worker)
    cluster.ask("text again", [TEXT + "And some new ones."])
    holder.wait_until_stored(len(tokens) // PAGE_TOKENS)
    cluster.knows(tokens, answer.worker, Tier.SSD)
    holder.flush_cache()
    cluster.knows(tokens, answer.worker, gone=True)
    cluster.ask("text from L3", [TEXT])


def life(cluster: Cluster, one: SglangServer) -> None:
    """A prompt that nobody knows; on the device, in the host pool, in L3."""
    cluster.foretell("cold", one, LONG)
    cluster.knows(LONG, url(one))
    cluster.foretell("L1", one, LONG)
    cluster.foretell("L1, a branch", one, BRANCH)
    one.complete(EXACT, max_tokens=2)
    cluster.knows(EXACT, url(one))
    cluster.foretell("L1, whole pages", one, EXACT)
    one.complete(SHORT, max_tokens=2)
    for seed in range(100, 105):
        one.complete(prompt(WHOLE, seed=seed), max_tokens=2)
    cluster.knows(LONG, url(one), gone=True)
    cluster.foretell("L2", one, LONG)
    cluster.knows(SHORT, url(one), Tier.SSD)
    cluster.knows(LONG, url(one), Tier.SSD)
    one.flush_cache()
    cluster.knows(LONG, url(one), gone=True)
    cluster.foretell("L3", one, LONG)
    cluster.foretell("L3, short", one, SHORT)


def test_first_turns_are_shared_out(scene: Scene) -> None:
    first = scene.routed["two SGLangs, first"]
    assert {answer.worker for answer in first} == {scene.workers["one"], scene.workers["two"]}
    assert all(answer.why.startswith("load; ") and answer.cached_tokens == 0 for answer in first)


@pytest.mark.parametrize("engines", ["two SGLangs", pytest.param("an SGLang and a vLLM", marks=needs_vllm)])
def test_second_turns_go_where_their_kv_is(scene: Scene, engines: str) -> None:
    first, second = scene.routed[f"{engines}, first"], scene.routed[f"{engines}, second"]
    assert len({answer.worker for answer in first}) == 2
    assert [answer.worker for answer in second] == [answer.worker for answer in first]
    assert [answer.cached_tokens for answer in second] == [FULL] * 4
    assert all(answer.why.startswith(f"prefix; holds {FULL} of {FULL + 20 + MORE} tokens") for answer in second)


def test_text_is_hashed_as_sglang_tokenizes_it(scene: Scene) -> None:
    (first,), (again,), (stored,) = (scene.routed[stage] for stage in ("text", "text again", "text from L3"))
    assert again.worker == stored.worker == first.worker
    assert again.cached_tokens == stored.cached_tokens == len(TEXT) // PAGE_TOKENS * PAGE_TOKENS
    assert "HBM" in again.why
    assert "HBM" not in stored.why
    assert "DRAM" in stored.why
    assert stored.text == first.text


def test_a_stopped_server_costs_its_kv_only(scene: Scene) -> None:
    (answer,) = scene.routed["the other one is left"]
    assert (answer.worker, answer.cached_tokens) == (scene.workers["two"], 0)


@pytest.mark.parametrize(("stage", "where"), [("L1", "HBM"), ("L2", "DRAM"), ("L3", "DRAM"), ("restarted", "SSD")])
def test_why_foretells_what_sglang_reuses(scene: Scene, stage: str, where: str) -> None:
    seen = scene.why[stage]
    assert seen.blocks == [("used", where)] * PAGES
    assert seen.said["reused_tokens"] == WHOLE == seen.answer.cached_tokens
    levels = {"L1": seen.answer.device, "L2": seen.answer.host}
    assert levels.get(stage, seen.answer.storage) == WHOLE


def test_why_knows_that_nothing_is_known(scene: Scene) -> None:
    seen = scene.why["cold"]
    assert seen.blocks == [("missing", None)] * PAGES
    assert seen.said["reused_tokens"] == 0 == seen.answer.cached_tokens


def test_why_knows_where_two_prompts_part(scene: Scene) -> None:
    seen = scene.why["L1, a branch"]
    assert seen.blocks[:7] == [("used", "HBM")] * 7
    assert {verdict for verdict, _ in seen.blocks[7:]} == {"missing"}
    assert seen.said["reused_tokens"] == 7 * PAGE_TOKENS == seen.answer.device


def test_why_knows_that_the_last_token_is_computed(scene: Scene) -> None:
    seen = scene.why["L1, whole pages"]
    assert seen.blocks == [("used", "HBM")] * (PAGES - 1) + [("last token", None)]
    assert seen.said["reused_tokens"] == WHOLE - PAGE_TOKENS == seen.answer.device


@pytest.mark.parametrize(("stage", "verdict"), [("L3, short", "open"), ("restarted, short", "too few")])
def test_why_knows_what_may_be_too_short_for_l3(scene: Scene, stage: str, verdict: str) -> None:
    """Three pages are less than SGLang reads from L3.  In DRAM they could be in L2 as well, on SSD they cannot."""
    seen = scene.why[stage]
    assert seen.blocks == [(verdict, None)] * 3
    assert seen.said["reused_tokens"] == 0 == seen.answer.cached_tokens
    assert "no less than 4 blocks" in seen.said["blocks"][0]["reason"]
