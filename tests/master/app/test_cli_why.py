"""``umbp why`` against a real master and a server that tokenizes like an engine's."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.master.app.master_process import CALL, MasterProcess
from tests.master.app.test_cli_ask import in_process
from umbp_connectors.prompt_hashes.hasher import Namespace
from umbp_connectors.prompt_hashes.tags import hasher_of
from umbp_core.master.model import Registration
from umbp_core.tiers import Tier

WHY = ("why", "--timeout", str(CALL))
BLOCK = 4
TAGS = {"engine": "vllm", "block": str(BLOCK), "hash": "sha256", "hash_form": "int64", "hash_start": "default"}
PROMPT = "0123456789abcdef!"
"""Four blocks and a token."""


class Engine(http.server.BaseHTTPRequestHandler):
    """One token per character; an adapter beside its model."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization", "Bearer right") != "Bearer right":
            self.send_error(401)
            return
        cards = [{"id": "m", "parent": None}, {"id": "poet", "parent": "m", "root": "/poet"}]
        self._answer({"data": cards} if self.path == "/v1/models" else None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["prompt"] if "prompt" in body else "".join(each["content"] for each in body["messages"])
        self._answer({"tokens": [ord(character) for character in text]})

    def _answer(self, value: Any) -> None:
        self.send_response(200 if value is not None else 404)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Nothing."""


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join(CALL)


def hashes(text: str, **space: str) -> list[bytes]:
    return hasher_of(TAGS).hashes([ord(character) for character in text], Namespace(**space))


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory, engine: str) -> Iterator[str]:
    """The engine's node holds the first block on two tiers, the second in DRAM; the third was there, the fourth is."""
    http_tag = {"http": f"127.0.0.1:{engine.rpartition(':')[2]}"}
    with MasterProcess(tmp_path_factory.mktemp("why"), UMBP_HEARTBEAT_TTL_SEC="3600") as process:
        client = process.native()
        first, second, third, fourth = hashes(PROMPT)
        registrations = {
            "mine": TAGS | http_tag,
            "rank": TAGS | http_tag | {"tp": "1"},
            "other": TAGS | {"http": "127.0.0.1:1"},
            "elsewhere": {"http": "nobody knows"},
            "two": TAGS | {"engine": "sglang", "http": "127.0.0.1:4", "tails": "unknown"},
            "two:tp1": TAGS | {"engine": "sglang", "http": "127.0.0.1:4", "tp": "1"},
            "wide": TAGS | {"http": "127.0.0.1:5", "hash_every": "2"},
            "random": TAGS | {"http": "127.0.0.1:2", "hash": "xxhash", "hash_start": "random"},
        }
        for name, tags in registrations.items():
            client.register(Registration(name, tags=tuple(f"{k}={v}" for k, v in tags.items())), CALL)
        client.report("mine", [first], Tier.HBM, CALL)
        client.report("mine", [first, second, third, fourth], Tier.DRAM, CALL)
        client.revoke("mine", [third], Tier.DRAM, CALL)
        client.report("other", [third], Tier.SSD, CALL)
        of_two = hashes(PROMPT, cache_salt="of two ranks")
        client.report("two", of_two, Tier.SSD, CALL)
        client.report("two:tp1", of_two[:2], Tier.SSD, CALL)
        client.report("mine", hashes(PROMPT, lora_name="poet", lora_path="/poet"), Tier.HBM, CALL)
        client.report("mine", hashes(PROMPT, cache_salt="tenant"), Tier.HBM, CALL)
        client.report("wide", hashes(PROMPT, cache_salt="of wide blocks")[1:2], Tier.DRAM, CALL)
        client.close()
        yield f"umbp://{process.doors['native']}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "prompt"
    made.write_text(PROMPT)
    return made


def values(master: str, engine: str, file: Path, *arguments: str) -> dict[str, Any]:
    command = (*WHY, "--json", "--prompt-file", str(file), "--engine", engine, "--master", master)
    code, out, err = in_process(*command, *arguments)
    assert (code, err) == (0, "")
    return dict(json.loads(out))


def test_each_block_with_where_it_is_and_why(master: str, engine: str, file: Path) -> None:
    found = values(master, engine, file)
    assert (found["node"], found["status"], found["prompt_tokens"], found["reused_tokens"]) == ("mine", "alive", 17, 8)
    assert [(b["verdict"], b["source"], b["tiers"], b["elsewhere"]) for b in found["blocks"]] == [
        ("used", "HBM", ["HBM", "DRAM"], []),
        ("used", "DRAM", ["DRAM"], []),
        ("missing", None, [], ["other"]),
        ("behind a hole", None, ["DRAM"], []),
    ]
    reason = found["blocks"][2]["reason"]
    assert reason.startswith("left DRAM ")
    assert reason.endswith(" s ago; held by other, which this engine does not read from")
    assert [block["hash"].encode() for block in found["blocks"]] == hashes(PROMPT)


def test_for_people(master: str, engine: str, file: Path) -> None:
    command = (*WHY, "--prompt-file", str(file), "--engine", engine, "--master", master)
    code, out, err = in_process(*command)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "node mine, 4 tokens per block"
    assert lines[-1].startswith(
        "8 of 17 tokens would be reused (1 from HBM, 1 from DRAM of 4 blocks); 9 are computed, "
    )
    assert sum(" used " in line for line in lines) == 2


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([ord(character) for character in PROMPT]),
        json.dumps({"prompt": PROMPT}),
        json.dumps({"messages": [{"role": "user", "content": PROMPT}]}),
    ],
    ids=["tokens", "completion", "chat"],
)
def test_a_prompt_may_be_given_in_each_form(master: str, engine: str, file: Path, content: str) -> None:
    file.write_text(content)
    assert values(master, engine, file)["reused_tokens"] == 8


@pytest.mark.parametrize("content", ["12345678", '"quoted"', "true"])
def test_a_text_that_happens_to_be_json_is_a_text(master: str, engine: str, file: Path, content: str) -> None:
    file.write_text(content)
    assert values(master, engine, file)["prompt_tokens"] in {len(content), len(content.strip('"'))}


def test_salt_and_adapter_are_part_of_what_is_asked_for(master: str, engine: str, file: Path) -> None:
    assert values(master, engine, file, "--cache-salt", "tenant")["reused_tokens"] == 16
    assert values(master, engine, file, "--model", "poet")["reused_tokens"] == 16
    assert values(master, engine, file, "--model", "poet", "--cache-salt", "tenant")["reused_tokens"] == 0


def test_short_loads(master: str, engine: str, file: Path) -> None:
    found = values(master, engine, file, "--min-load-blocks", "2")
    assert [block["verdict"] for block in found["blocks"]] == ["used", "too few", "missing", "behind a hole"]


def test_what_is_short_counts_links_of_the_chain(master: str, engine: str, file: Path) -> None:
    """As vLLM's blocks of the smallest group, of which a judged one may cover several."""
    for least, verdict in (("2", "used"), ("3", "too few")):
        options = ("--node", "wide", "--cache-salt", "of wide blocks", "--min-load-blocks", least)
        found = values(master, engine, file, *options)
        assert [block["verdict"] for block in found["blocks"]] == [verdict, "missing"]


def test_another_node_by_name(master: str, engine: str, file: Path) -> None:
    found = values(master, engine, file, "--node", "other")
    assert (found["node"], found["blocks"][0]["elsewhere"]) == ("other", ["mine"])


def test_ranks_with_a_storage_of_their_own_and_layers_that_nobody_tells_of(
    master: str, engine: str, file: Path
) -> None:
    found = values(master, engine, file, "--node", "two", "--cache-salt", "of two ranks")
    assert (found["reused_tokens"], found["at_most"]) == (8, True)
    assert found["summary"].startswith("at most 8 of 17 tokens would be reused")
    assert [(block["verdict"], block["lacking"], block["elsewhere"]) for block in found["blocks"]] == [
        ("used", [], []),
        ("used", [], []),
        ("missing", ["two:tp1"], []),
        ("behind a hole", ["two:tp1"], []),
    ]
    one = values(master, engine, file, "--node", "two:tp1", "--cache-salt", "of two ranks")
    assert (one["reused_tokens"], one["at_most"], one["blocks"][0]["elsewhere"]) == (8, False, ["two"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--node", "random"), "drew for itself (hash_start=random)"),
        (("--node", "nobody"), "no node of the master is called 'nobody'; there are: "),
        (("--engine", "http://127.0.0.1:3"), "no node of the master has the tag http=127.0.0.1:3"),
        (("--engine", "nowhere"), "'nowhere' is no address"),
        (("--prompt-file", "/does/not/exist"), "cannot be read"),
    ],
)
def test_what_cannot_be_answered_says_why(
    master: str, engine: str, file: Path, arguments: tuple[str, ...], says: str
) -> None:
    base = ("--prompt-file", str(file), "--engine", engine, "--master", master)
    code, out, err = in_process("why", *base, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_the_key_of_the_environment_is_shown(master: str, engine: str, file: Path) -> None:
    command = (*WHY, "--json", "--prompt-file", str(file), "--engine", engine, "--master", master)
    code, out, _ = in_process(*command, OPENAI_API_KEY="right")
    assert (code, json.loads(out)["reused_tokens"]) == (0, 8)
    code, _, err = in_process(*command, OPENAI_API_KEY="wrong")
    assert (code, "/v1/models answered 401" in err, "wrong" in err) == (2, True, False)


def test_an_engine_that_is_not_there(master: str, file: Path) -> None:
    command = ("--prompt-file", str(file), "--engine", "http://127.0.0.1:1", "--node", "mine", "--master", master)
    code, _, err = in_process("why", *command)
    assert (code, "does an engine serve there?" in err) == (2, True)
