"""Two ranks, each with the pages of its own heads, and each a node of the master."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from examples.serving_sglang import PAGE_TOKENS, SglangServer, cpu_only, extra_config
from tests.connectors.reporting.at_master import DRAM, HBM, SSD, Held, known_at
from tests.connectors.waiting import eventually
from tests.master.app.master_process import CALL, MasterProcess
from tests.master.app.test_cli_ask import in_process
from tests.sglang.server import truths
from tests.sglang.server.servers import LAUNCH_SERVER, MAX_TOKENS, PAGES, prompts, server
from tests.sglang.server.truths import Document
from umbp_connectors.prompt_hashes.sglang import SGLangHasher

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_two_ranks_find_what_both_stored(model: Path, tmp_path: Path) -> None:
    questions = prompts(0, 2)
    pool = {"dram_capacity": "64MiB", "ssd_dir": tmp_path / "ssd", "ssd_capacity": "128MiB"}
    bound = {"SGLANG_CPU_OMP_THREADS_BIND": "0|0"} if cpu_only() else {}
    documents = [Document(tuple(each)) for each in questions]
    pages = {page for each in questions for page in SGLangHasher(PAGE_TOKENS).hashes(each)}
    with MasterProcess(tmp_path, "--listen=none") as master, truths.doors() as doors:
        environment = {**bound, **truths.environment(doors)}
        pool["master_address"] = f"umbp://{master.doors['native']}"
        arguments = [*extra_config(**pool), "--tp-size", "2"]
        with server(model, tmp_path, *arguments, launcher=LAUNCH_SERVER, environment=environment) as running:
            cold = [running.complete(each, MAX_TOKENS) for each in questions]
            running.wait_until_stored(2 * len(questions) * PAGES)
            told = by_rank(master, [{HBM: pages, DRAM: pages, SSD: pages}, {DRAM: pages, SSD: pages}])
            truth = [truths.ask(doors, documents, SGLangHasher(PAGE_TOKENS), rank) for rank in (0, 1)]
            running.flush_cache()
            flushed = by_rank(master, [{DRAM: pages, SSD: pages}] * 2)
            why = foretold(running, master, tmp_path, questions[0])
            found = [running.complete(each, MAX_TOKENS) for each in questions]
        master.end(signal.SIGTERM)
    assert [answer.cached_tokens for answer in cold] == [0, 0]
    assert [answer.storage for answer in found] == [PAGES * PAGE_TOKENS] * 2
    assert [answer.tokens for answer in found] == [answer.tokens for answer in cold]
    ranks = {path.parent.name for path in (tmp_path / "ssd").glob("*/*/slab-*")}
    assert ranks == {"rank0", "rank1"}, "each rank has a part of its own"
    assert told == [{HBM: pages, DRAM: pages, SSD: pages}, {DRAM: pages, SSD: pages}], "events are the first rank's"
    assert truth[0].held() == told[0]
    assert truth[1].pool == {"DRAM": told[1][DRAM], "SSD": told[1][SSD]}
    assert truth[1].device == truth[1].host == pages, "what the other ranks have in L1 and L2 is not told"
    assert flushed == [{DRAM: pages, SSD: pages}] * 2
    assert why["reused_tokens"] == found[0].storage
    assert {(block["verdict"], block["source"]) for block in why["blocks"]} == {("used", "DRAM")}
    assert [block["lacking"] for block in why["blocks"]] == [[]] * PAGES, "the other rank was looked at, and has all"


def foretold(running: SglangServer, master: MasterProcess, folder: Path, prompt: list[int]) -> dict[str, Any]:
    """What ``umbp why`` says of a prompt."""
    file = folder / "prompt.json"
    file.write_text(json.dumps(prompt))
    command = ("why", "--json", "--prompt-file", str(file), "--engine", f"http://127.0.0.1:{running.port}")
    address = f"umbp://{master.doors['native']}"
    code, out, err = in_process(*command, "--timeout", "60", "--master", address)
    assert (code, err) == (0, "")
    return dict(json.loads(out))


def by_rank(master: MasterProcess, wanted: list[Held]) -> list[Held]:
    """What the master knows of each rank, as soon as it is what is wanted."""

    def known() -> list[Held]:
        with closing(master.native()) as client:
            nodes = sorted(node.node_id for node in client.list_nodes(CALL))
        assert [node.rpartition(":")[2] for node in nodes] == ["tp0", "tp1"]
        return [known_at(master, node) for node in nodes]

    eventually(lambda: known() == wanted, 20.0)
    return known()
