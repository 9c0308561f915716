"""The command ``umbp why``: where a prompt's KV is, block by block, and why it would or would not be used."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from umbp_connectors.cli_access import HASHES_PER_CALL, MasterAccess, asks_master, native_of
from umbp_connectors.cli_tables import console, table
from umbp_core.errors import ConfigError

if TYPE_CHECKING:
    from umbp_connectors.prompt_hashes.hasher import Namespace, PromptHasher
    from umbp_connectors.why import BlockFacts, JudgedBlock, Judgement
    from umbp_core.master.model import NodeInfo
    from umbp_core.master.transport import NativeTransport

EXPLAINED = 256
"""So many missing blocks are asked about one by one; those behind them went the same way or were never there."""

PromptFileOption = Annotated[
    Path,
    typer.Option(
        "--prompt-file",
        metavar="PATH",
        help="The prompt: text, a JSON list of token ids, or the JSON of a (chat) completion. `-`: standard input.",
    ),
]
EngineOption = Annotated[
    str, typer.Option("--engine", metavar="URL", help="The engine's server, which tokenizes: http://HOST:PORT.")
]
NodeOption = Annotated[
    str, typer.Option("--node", metavar="NAME", help="The engine's node at the master, where its URL does not say it.")
]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="NAME", help="The model, or adapter, that the prompt is for.")
]
SaltOption = Annotated[str, typer.Option("--cache-salt", metavar="TEXT", help="The request's cache salt.")]
MinLoadOption = Annotated[
    int | None,
    typer.Option("--min-load-blocks", metavar="N", min=1, help="Instead of what the node says of itself."),
]
BlocksOption = Annotated[bool, typer.Option("--blocks", help="A line for each block, instead of one for equal ones.")]


@asks_master
def why(
    access: MasterAccess,
    prompt_file: PromptFileOption,
    engine: EngineOption,
    node: NodeOption = "",
    model: ModelOption = "",
    cache_salt: SaltOption = "",
    min_load_blocks: MinLoadOption = None,
    blocks: BlocksOption = False,
) -> None:
    """Explain block by block where a prompt's KV is, and why an engine would use it or compute it again.

    Asks the engine for the prompt's tokens, and a master for what the engine's node holds. Nothing is generated.
    """
    from umbp_connectors.engine_http import EngineHttp
    from umbp_connectors.prompt_hashes.tags import hasher_of, tag_values
    from umbp_connectors.reporting.node import TAILS_UNKNOWN
    from umbp_connectors.why import judge

    server = EngineHttp(engine, access.timeout, os.environ.get("OPENAI_API_KEY", ""))
    body = _body(prompt_file, model, cache_salt)
    with access.connected() as transport:
        client = native_of(transport, "explain")
        infos = client.list_nodes(access.timeout)
        candidates = _nodes_of(infos, server.url, node)
        prompt = _prompt_of(server, body)
        tags = tag_values(candidates[0].tags)
        hasher = hasher_of(tags, os.environ.get("PYTHONHASHSEED"))
        keys = hasher.hashes(prompt.tokens, prompt.namespace)
        held = _held(client, keys, access.timeout)
        chosen = max(candidates, key=lambda info: _leading(keys, held.get(info.node_id, {})))
        ranks = _other_ranks(infos, chosen)
        facts = _facts(client, chosen.node_id, ranks, keys, held, access.timeout)
    least = _least(tags, min_load_blocks)
    at_most = tags.get("tails") == TAILS_UNKNOWN
    judgement = judge(facts, len(prompt.tokens), hasher.block_tokens, tags.get("engine", ""), least, at_most)
    if access.as_json:
        typer.echo(json.dumps(_values(chosen, judgement), indent=2))
    else:
        _show(chosen, hasher, judgement, one_by_one=blocks)


@dataclass(frozen=True, slots=True)
class _Prompt:
    tokens: Sequence[int]
    namespace: Namespace


def _body(file: Path, model: str, salt: str) -> dict[str, Any]:
    """The prompt as the body of a request."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the prompt cannot be read from {file}: {error}") from error
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    body: dict[str, Any] = dict(value) if isinstance(value, dict) else {"prompt": value or text}
    if not isinstance(body.get("prompt", []), (str, list)):
        body["prompt"] = text  # a text that happens to be JSON, such as a number
    given = {"model": model, "cache_salt": salt}
    return body | {name: value for name, value in given.items() if value}


def _prompt_of(server: Any, body: Mapping[str, Any]) -> _Prompt:
    """Tokens and namespace, with the engine's help."""
    from umbp_connectors.engine_http import EngineUnreachable
    from umbp_connectors.prompt_hashes import requests
    from umbp_connectors.prompt_hashes.hasher import NO_NAMESPACE

    try:
        adapters = requests.adapters_of(server.get("/v1/models"))
    except ValueError as error:
        raise EngineUnreachable(f"{server.url}: {error}") from error
    if not body.get("model"):
        body = {**body, "model": next(iter(adapters), "")}
    path = requests.CHAT if "messages" in body else requests.COMPLETIONS
    question = requests.question_of(path, body)
    tokens = question.tokens
    if tokens is None:
        tokens = requests.tokens_of(server.post("/tokenize", question.body))
    return _Prompt(tokens, requests.namespace_of(body, adapters.get(str(body["model"]), NO_NAMESPACE)))


def _nodes_of(infos: Sequence[NodeInfo], url: str, name: str) -> list[NodeInfo]:
    """The node of this name; else those of the engine at ``url``, without ranks that the first stands for."""
    from umbp_connectors.prompt_hashes.tags import is_first_rank, tag_values

    if name:
        found = [info for info in infos if info.node_id == name]
    else:
        tagged = [(info, tag_values(info.tags)) for info in infos]
        found = [info for info, tags in tagged if is_first_rank(tags) and _place(tags.get("http", "")) == url]
    if not found:
        wanted = f"is called {name!r}" if name else f"has the tag http={url.partition('://')[2]}"
        names = ", ".join(info.node_id for info in infos) or "none"
        raise ConfigError(f"no node of the master {wanted}; there are: {names}. Give one by --node")
    return found


def _other_ranks(infos: Sequence[NodeInfo], first: NodeInfo) -> list[str]:
    """The nodes of the other tensor and pipeline parallel ranks that answer together with ``first``."""
    from umbp_connectors.prompt_hashes.tags import is_first_rank, tag_values

    own = tag_values(first.tags)
    if "http" not in own or not is_first_rank(own):
        return []
    same = ("http", "dp", "role")
    others = [(info.node_id, tag_values(info.tags)) for info in infos]
    return [
        name
        for name, tags in others
        if not is_first_rank(tags) and all(tags.get(each) == own.get(each) for each in same)
    ]


def _least(tags: Mapping[str, str], given: int | None) -> int:
    """How many blocks a node loads at least: what was ``given`` or its tag says, in links of the chain of hashes."""
    links = given or _number(tags, "min_load")
    return max(1, -(-links // max(1, _number(tags, "hash_every"))))


def _number(tags: Mapping[str, str], name: str) -> int:
    text = tags.get(name, "")
    return int(text) if text.isdecimal() else 1


def _place(text: str) -> str:
    """Where a node says that it serves; empty when that is no address."""
    from umbp_connectors.engine_http import place_of

    try:
        return place_of(text)
    except ConfigError:
        return ""


def _held(client: NativeTransport, keys: Sequence[bytes], timeout: float) -> dict[str, dict[bytes, tuple[int, ...]]]:
    """Node to block to tiers, fastest first."""
    held: dict[str, dict[bytes, tuple[int, ...]]] = {}
    for start in range(0, len(keys), HASHES_PER_CALL):
        for match in client.match(keys[start : start + HASHES_PER_CALL], False, timeout):
            tiers = held.setdefault(match.node_id, {})
            for tier, found in match.tiers.items():
                for key in found:
                    tiers[key] = (*tiers.get(key, ()), tier)
    return held


def _leading(keys: Sequence[bytes], held: Mapping[bytes, object]) -> int:
    return next((index for index, key in enumerate(keys) if key not in held), len(keys))


def _facts(
    client: NativeTransport,
    node: str,
    ranks: Sequence[str],
    keys: Sequence[bytes],
    held: Mapping[str, Mapping[bytes, tuple[int, ...]]],
    timeout: float,
) -> list[BlockFacts]:
    from umbp_connectors.why import BlockFacts

    here = held.get(node, {})
    others = {name: blocks for name, blocks in held.items() if name != node and name not in ranks}
    missing = [key for key in keys if key not in here][:EXPLAINED]
    changes = {key: client.explain(node, key, timeout).changes for key in missing}
    return [
        BlockFacts(
            key,
            here.get(key, ()),
            changes.get(key, ()),
            tuple(sorted(name for name, blocks in others.items() if key in blocks)),
            tuple(name for name in ranks if key not in held.get(name, {})),
        )
        for key in keys
    ]


def _values(node: NodeInfo, judgement: Judgement) -> dict[str, Any]:
    from umbp_connectors.cli_views import text_of, tier_name

    return {
        "node": node.node_id,
        "status": node.status.name.lower(),
        "prompt_tokens": judgement.prompt_tokens,
        "block_tokens": judgement.block_tokens,
        "reused_tokens": judgement.reused_tokens,
        "at_most": judgement.at_most,
        "summary": judgement.summary(),
        "blocks": [
            {
                "index": block.index,
                "hash": text_of(block.facts.key),
                "tiers": [tier_name(tier) for tier in block.facts.tiers],
                "elsewhere": list(block.facts.elsewhere),
                "lacking": list(block.facts.lacking),
                "verdict": block.verdict.value,
                "source": None if block.source is None else tier_name(block.source),
                "reason": block.reason,
            }
            for block in judgement.blocks
        ],
    }


def _show(node: NodeInfo, hasher: PromptHasher, judgement: Judgement, *, one_by_one: bool) -> None:
    from umbp_core.master.model import NodeStatus

    out = console(highlight=False)
    out.print(f"node {escape(node.node_id)}, {hasher.block_tokens} tokens per block")
    if node.status is not NodeStatus.ALIVE:
        out.print(f"[yellow]the node is {node.status.name.lower()}: what it held is not known any more[/]")
    rows = table("blocks", "tokens from", "hash", "on", "verdict", "why")
    runs = [(block, block) for block in judgement.blocks] if one_by_one else judgement.runs()
    for first, last in runs:
        rows.add_row(*_row(first, last, judgement.block_tokens))
    if judgement.blocks:
        out.print(rows)
    out.print(escape(judgement.summary()))


def _row(first: JudgedBlock, last: JudgedBlock, block_tokens: int) -> list[str]:
    from umbp_connectors.cli_views import text_of, tier_name
    from umbp_connectors.why import Verdict

    style = "green" if first.verdict is Verdict.USED else "yellow"
    blocks = str(first.index) if first is last else f"{first.index}-{last.index}"
    tiers = ", ".join(map(tier_name, first.facts.tiers)) or "-"
    key = text_of(first.facts.key)
    shown = key if first is last else f"{key} ..."
    return [
        blocks,
        str(first.index * block_tokens),
        escape(shown),
        tiers,
        f"[{style}]{first.verdict.value}[/]",
        escape(first.reason),
    ]
