"""Two real engines that report to a real master, and the router in front of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from examples.demo_router import strays
from examples.router_cluster import Cluster, Routed, cluster
from examples.router_load import Turn
from examples.serving import VllmServer, cpu_environment
from tests.master.app.test_cli_ask import in_process
from tests.vllm.engine.local import BLOCK
from tests.vllm.models import prompt
from umbp_connectors.client.reader import MasterReader
from umbp_connectors.client.settings import ClientSettings
from umbp_connectors.prompt_hashes.tags import hasher_of, tag_values
from umbp_core.tiers import Tier

EXTRA = "--kv-transfer-config.kv_connector_extra_config"
FULL = 288
"""Tokens in the nine full blocks of a prompt of 300."""
ARGUMENTS = [
    *("--kv-connector", "umbp", f"{EXTRA}.dram_capacity", "64MiB", "--enforce-eager", "--dtype", "float32"),
    *("--block-size", str(BLOCK), "--max-model-len", "1024", "--max-num-seqs", "8", "--enable-prompt-tokens-details"),
]


@pytest.fixture(scope="module")
def running(make_model: object, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "UMBP_DRAM_PREFAULT": "false",
        **cpu_environment(),
    }
    flags = ("--tokenize-timeout", "60", "--match-timeout", "30", "--refresh-interval", "0.5")
    with cluster(llama, tmp_path_factory.mktemp("router"), ARGUMENTS, environment, flags) as started:
        yield started


def ask(running: Cluster, text: Sequence[int] | str) -> Routed:
    return running.router.complete(text)


def url(worker: VllmServer) -> str:
    return f"http://127.0.0.1:{worker.port}"


def blocks_known(running: Cluster, tokens: Sequence[int], tier: Tier) -> Iterator[tuple[int, int]]:
    """Again and again: how many leading blocks of ``tokens`` some node holds on ``tier``, and how many there are."""
    reader = MasterReader(running.master.address, settings=ClientSettings(query_timeout=60.0))
    infos = reader.nodes() or []
    hashes = hasher_of(tag_values(infos[0].tags)).hashes(tokens)
    try:
        for _ in range(2000):
            found = reader.match_prefix(hashes, {tier: 1.0}, timeout=60.0) or []
            yield max((match.length for match in found), default=0), len(hashes)
    finally:
        reader.close()


def wait_until_known(running: Cluster, tokens: Sequence[int], tier: Tier = Tier.HBM) -> None:
    """Until the master knows a node that holds all full blocks of ``tokens`` on ``tier``."""
    with closing(blocks_known(running, tokens, tier)) as counts:
        assert any(known == of for known, of in counts)


def wait_until_gone(running: Cluster, tokens: Sequence[int], tier: Tier = Tier.HBM) -> None:
    """Until the master knows nobody who holds the first block of ``tokens`` on ``tier``."""
    with closing(blocks_known(running, tokens, tier)) as counts:
        assert any(known == 0 for known, _ in counts)


def test_the_demo_would_notice_a_conversation_that_strays() -> None:
    def turn(conversation: int, number: int, worker: str) -> Turn:
        return Turn(conversation, number, Routed(worker, "", 0.1, 300, 0, ""))

    right = [turn(0, 0, "a"), turn(1, 0, "b"), turn(0, 1, "a"), turn(1, 1, "b")]
    astray = turn(0, 2, "b")
    assert strays(right) == []
    assert strays([*right, astray]) == [astray]


@pytest.mark.slow
def test_prompts_go_where_their_kv_is(running: Cluster) -> None:
    """First turns are shared out; each second turn goes to the engine of the first, which computes only what is new."""
    texts = [prompt(300, seed=500 + seed) for seed in range(4)]
    first = [ask(running, text) for text in texts]
    assert {answer.worker for answer in first} == {url(worker) for worker in running.workers}
    assert all(answer.why.startswith("load; ") and answer.cached_tokens == 0 for answer in first)
    for text in texts:
        wait_until_known(running, text)
    second = [ask(running, [*text, *range(40)]) for text in texts]
    assert [answer.worker for answer in second] == [answer.worker for answer in first]
    assert [answer.cached_tokens for answer in second] == [FULL] * 4
    assert all(answer.why.startswith(f"prefix; holds {FULL} of 340 tokens") for answer in second)


@pytest.mark.slow
def test_what_left_the_gpu_is_found_in_dram(running: Cluster) -> None:
    text = prompt(300, seed=510)
    first = ask(running, text)
    wait_until_known(running, text)
    (holder,) = [worker for worker in running.workers if url(worker) == first.worker]
    holder.reset_prefix_cache()
    holder.wait_for_metric("vllm:umbp_stored_blocks", FULL // BLOCK, tier="dram")
    again = ask(running, text)
    assert (again.worker, again.cached_tokens) == (first.worker, FULL)
    assert "DRAM" in again.why


@pytest.mark.slow
def test_text_is_hashed_as_the_engine_tokenizes_it(running: Cluster) -> None:
    text = "The same words, and again the same words. " * 8
    first = ask(running, text)
    assert first.prompt_tokens == len(text)
    wait_until_known(running, running.workers[0].post("/tokenize", {"prompt": text})["tokens"])
    again = ask(running, text + "And some new ones.")
    assert (again.worker, again.why.split(";")[0]) == (first.worker, "prefix")
    assert again.cached_tokens == len(text) // BLOCK * BLOCK


@pytest.mark.slow
@pytest.mark.parametrize("length", [300, 320], ids=["a tail", "whole blocks"])
def test_why_foretells_what_the_engine_reuses(running: Cluster, tmp_path: Path, length: int) -> None:
    """Cold, in HBM, and in DRAM alone; with a tail, and with a last block that ends the prompt."""
    worker = running.workers[0]
    text = prompt(length, seed=540 + length)
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(text))

    def foretold() -> tuple[int, set[str]]:
        command = ("why", "--json", "--prompt-file", str(file), "--engine", url(worker), "--timeout", "60")
        code, out, err = in_process(*command, "--master", running.master.address)
        assert (code, err) == (0, "")
        value = json.loads(out)
        return value["reused_tokens"], {block["source"] for block in value["blocks"] if block["source"]}

    def reused() -> int:
        return worker.complete(text, max_tokens=2).cached_tokens

    assert (foretold(), reused()) == ((0, set()), 0)
    wait_until_known(running, text)
    wait_until_known(running, text, tier=Tier.DRAM)
    for sources in ({"HBM"} if length % BLOCK else {"HBM", "DRAM"}, {"DRAM"}):
        tokens, found = foretold()
        assert found == sources
        assert reused() in {tokens, tokens + 1}, "an engine counts the last token of a whole block as reused"
        worker.reset_prefix_cache()
        wait_until_gone(running, text)


@pytest.mark.slow
def test_a_dead_engine_costs_its_kv_and_a_dead_master_the_affinity(running: Cluster) -> None:
    """The last test: it ends what the others use."""
    text = prompt(300, seed=530)
    first = ask(running, text)
    wait_until_known(running, text)
    (holder,) = [worker for worker in running.workers if url(worker) == first.worker]
    (other,) = [worker for worker in running.workers if worker is not holder]
    holder.kill()
    after = ask(running, text)
    assert (after.worker, after.cached_tokens, after.text) == (url(other), 0, first.text)
    running.master.kill()
    alone = ask(running, text)
    assert (alone.worker, alone.cached_tokens, alone.text) == (url(other), FULL, first.text)
    assert "the master does not answer" in alone.why
