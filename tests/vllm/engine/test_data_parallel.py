"""Data-parallel engines behind one server: each has a pool, an SSD folder and a node at the master of its own."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from examples.serving import MODEL_NAME, VllmServer, cpu_environment
from tests.master.app.master_process import CALL, MasterProcess
from tests.vllm.engine.local import BLOCK, Ask
from tests.vllm.engine.oracle import Oracle
from tests.vllm.harness.reported import known_at, published, until_known
from tests.vllm.models import prompt
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_core.tiers import Tier

EXTRA = "--kv-transfer-config.kv_connector_extra_config"
CAPACITY = 32 << 20
FULL = 288
"""Tokens in the nine full blocks of a prompt of 300; DRAM has room for twelve."""


def complete(server: VllmServer, rank: int, text: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Greedy tokens from engine ``rank``, and how much of the prompt it did not compute."""
    body = {
        "model": MODEL_NAME,
        "prompt": list(text),
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
    details = answer["usage"].get("prompt_tokens_details") or {}
    return tuple(answer["choices"][0]["token_ids"]), details.get("cached_tokens") or 0


@dataclass(frozen=True)
class Answers:
    """Tokens and cached tokens by rank, and hits by tier, in the order of what happens."""

    cold: list[tuple[tuple[int, ...], int]]
    from_dram: list[tuple[tuple[int, ...], int]]
    found: list[float]
    strangers: list[tuple[tuple[int, ...], int]]
    from_both: list[tuple[tuple[int, ...], int]]
    found_on_ssd: list[float]


@pytest.mark.slow
@pytest.mark.statement("connector", 86)
def test_two_engines_behind_one_server(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    texts = [prompt(300, seed=70 + rank) for rank in range(2)]
    right = [reply.tokens for reply in oracle.ask(llama, *[Ask(text) for text in texts])]
    folder = tmp_path / "ssd"
    arguments = ["--data-parallel-size", "2", "--kv-connector", "umbp", f"{EXTRA}.ssd_dir", str(folder)]
    arguments += [f"{EXTRA}.ssd_capacity", str(CAPACITY), f"{EXTRA}.dram_capacity", "768KiB"]
    arguments += ["--api-server-count", "1"]
    arguments += ["--enforce-eager", "--dtype", "float32", "--block-size", str(BLOCK), "--max-model-len", "1024"]
    arguments += ["--max-num-seqs", "8", "--enable-prompt-tokens-details"]
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "UMBP_DRAM_PREFAULT": "false",
        **cpu_environment(),
    }
    with MasterProcess(tmp_path) as master:
        environment["UMBP_MASTER_ADDRESS"] = f"umbp://{master.doors['native']}"
        server = VllmServer(llama, tmp_path / "server.log", arguments, environment)
        with server, contextlib.closing(master.native()) as client:
            answers = _ask_both(server, texts, client)
    _check(answers, right, folder)
    assert "Traceback" not in server.log.read_text()


def _ask_both(server: VllmServer, texts: Sequence[Sequence[int]], client: NativeBlockingClient) -> Answers:
    cold = [complete(server, rank, text) for rank, text in enumerate(texts)]
    _forget(server, 9)
    from_dram = [complete(server, rank, text) for rank, text in enumerate(texts)]
    _check_nodes(server, client, texts)
    found = [server.metric("vllm:umbp_hit_tokens", tier="dram", engine=str(rank)) for rank in range(2)]
    strangers = [complete(server, 1 - rank, text) for rank, text in enumerate(texts)]
    _forget(server, 18)
    from_both = [complete(server, rank, text) for rank, text in enumerate(texts)]
    found_on_ssd = [server.metric("vllm:umbp_hit_tokens", tier="ssd", engine=str(rank)) for rank in range(2)]
    return Answers(cold, from_dram, found, strangers, from_both, found_on_ssd)


def _check(answers: Answers, right: Sequence[tuple[int, ...]], folder: Path) -> None:
    assert answers.cold == [(tokens, 0) for tokens in right]
    assert answers.from_dram == answers.from_both == [(tokens, FULL) for tokens in right]
    assert answers.found == [FULL, FULL]
    assert answers.strangers == [(tokens, 0) for tokens in right], "an engine does not see the other's pool"
    assert all(tokens > 0 for tokens in answers.found_on_ssd), "what the others' prompts drove out of DRAM"
    homes = [home for home in folder.iterdir() if home.is_dir()]
    used = [sum(file.stat().st_size for file in home.rglob("*") if file.is_file()) for home in homes]
    assert len(homes) == 2
    assert all(CAPACITY // 4 < nbytes <= CAPACITY // 2 for nbytes in used)


def _check_nodes(server: VllmServer, client: NativeBlockingClient, texts: Sequence[Sequence[int]]) -> None:
    """Each engine is a node that holds its own prompt on all tiers, and both say where they are asked."""
    place = f"127.0.0.1:{server.port}"
    nodes = [f"{socket.gethostname()}:{server.port}:dp{rank}:pp0:tp0" for rank in range(2)]
    for rank, text in enumerate(texts):
        hashes = set(map(published, _hashes(text)))
        assert len(hashes) == FULL // BLOCK
        held = {Tier.HBM: hashes, Tier.DRAM: hashes, Tier.SSD: hashes}
        until_known(functools.partial(known_at, client, nodes[rank]), held)
    tags = {info.node_id: set(info.tags) for info in client.list_nodes(CALL)}
    assert sorted(tags) == nodes
    for rank, node in enumerate(nodes):
        expected = {"engine=vllm", f"model={MODEL_NAME}", "role=both", f"dp={rank}", f"http={place}", f"block={BLOCK}"}
        assert tags[node] > expected
        assert tags[node] > {"hash=sha256", "hash_form=int64", "hash_start=default", "hash_keys=tagged"}


def _hashes(text: Sequence[int]) -> list[bytes]:
    """vLLM's own hashes of a prompt's full blocks."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    request = Request("hashes", list(text), SamplingParams(max_tokens=1), None, block_hasher=hasher)
    return list(request.block_hashes)


def _forget(server: VllmServer, blocks: int) -> None:
    """Wait until each engine has this many blocks on SSD, then empty vLLM's own caches."""
    for rank in range(2):
        server.wait_for_metric("vllm:umbp_stored_blocks", blocks, tier="ssd", engine=str(rank))
    server.reset_prefix_cache()
