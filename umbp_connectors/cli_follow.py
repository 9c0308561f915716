"""The command ``umbp follow``: an engine without a plug-in of ours, made known to a master by its event stream."""

from __future__ import annotations

import enum
import json
import queue
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umbp_connectors.cli_access import MasterAccess, asks_master
from umbp_core.errors import ConfigError

if TYPE_CHECKING:
    from umbp_connectors.config_model import UmbpConfig
    from umbp_connectors.reporting.node import NodeFacts
    from umbp_connectors.reporting.reporter import Reporter
    from umbp_connectors.reporting.zmq_follower import Follower
    from umbp_connectors.reporting.zmq_sockets import StreamSettings

METRICS_INTERVAL = 10.0
_LOG_LEVEL = "info"
_EMPTY_AFTER = 5.0


class EngineName(str, enum.Enum):
    """Whose stream it is."""

    VLLM = "vllm"
    SGLANG = "sglang"


class RoleName(str, enum.Enum):
    """What the engine does."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


HttpOption = Annotated[
    str,
    typer.Option("--http", metavar="HOST:PORT", help="The engine's server: names the node, and is where routers go."),
]
EndpointArgument = Annotated[
    str,
    typer.Argument(metavar="[ENDPOINT]", help="`endpoint` of the engine's KV events; `*` is this machine."),
]
ReplayOption = Annotated[
    str,
    typer.Option("--replay", metavar="ENDPOINT", help="`replay_endpoint` of the engine; without it a gap clears all."),
]
TopicOption = Annotated[str, typer.Option("--topic", metavar="TEXT", help="`topic` of the engine, or its beginning.")]
BindOption = Annotated[
    bool,
    typer.Option("--bind", help="Listen at ENDPOINT: an engine connects whose endpoint names a host instead of `*`."),
]
EngineOption = Annotated[EngineName, typer.Option("--engine", help="Whose stream it is; a tag of the node.")]
ModelOption = Annotated[str, typer.Option("--model", metavar="NAME", help="The model as it is served; a tag.")]
VersionOption = Annotated[str, typer.Option("--engine-version", metavar="TEXT", help="The engine's version; a tag.")]
RoleOption = Annotated[RoleName, typer.Option("--role", help="What the engine does; a tag, and part of the name.")]
RankOption = Annotated[int, typer.Option("--dp-rank", metavar="N", min=0, help="The first data-parallel rank.")]
RanksOption = Annotated[
    int,
    typer.Option("--dp-size", metavar="N", min=1, max=256, help="So many ranks, each a node and a port of its own."),
]
NodeOption = Annotated[
    str, typer.Option("--node-id", metavar="NAME", help="Name of the node instead of the derived one.")
]
TagOption = Annotated[
    list[str] | None, typer.Option("--node-tag", metavar="NAME=VALUE", help="One more tag of the node; several times.")
]
GraceOption = Annotated[
    float,
    typer.Option("--grace", metavar="SECONDS", min=0.1, help="An engine that is away for longer counts as empty."),
]


@asks_master
def follow(
    access: MasterAccess,
    http: HttpOption,
    endpoint: EndpointArgument = "tcp://*:5557",
    replay: ReplayOption = "",
    topic: TopicOption = "",
    bind: BindOption = False,
    engine: EngineOption = EngineName.VLLM,
    model: ModelOption = "",
    engine_version: VersionOption = "",
    role: RoleOption = RoleName.BOTH,
    dp_rank: RankOption = 0,
    dp_size: RanksOption = 1,
    node_id: NodeOption = "",
    node_tag: TagOption = None,
    grace: GraceOption = _EMPTY_AFTER,
) -> None:
    """Follow the KV events of a vLLM or SGLang that has no plug-in of ours, and report for it to a master.

    For engines that publish with ZMQ (`--kv-events-config`). Runs until SIGTERM or SIGINT, and takes the node from the
    master then. With --json, prints its counters at the end.
    """
    from umbp_connectors.logs import log_to_stderr

    streams = [_stream(endpoint, replay, topic, bind, rank) for rank in range(dp_rank, dp_rank + dp_size)]
    config = _config(access, node_id, tuple(node_tag or ()))
    host, port = _server(http)
    log_to_stderr(_LOG_LEVEL)

    def facts(rank: int) -> NodeFacts:
        from umbp_connectors.reporting.node import NodeFacts

        return NodeFacts(
            engine.value, model, engine_version, role.value, host, port, dp=rank, several=dp_rank + dp_size > 1
        )

    with ExitStack() as stack:
        pairs = []
        for rank, stream in enumerate(streams, dp_rank):
            reporter = _reporter(config, facts(rank))
            stack.callback(reporter.close)
            pairs.append((_follower(stream, reporter, grace), reporter))
        _run(pairs, access.timeout)
        if access.as_json:
            for follower, _ in pairs:
                print(json.dumps(asdict(follower.stats())))


def _stream(endpoint: str, replay: str, topic: str, bind: bool, rank: int) -> StreamSettings:
    try:
        from umbp_connectors.reporting.zmq_endpoints import endpoint_of
        from umbp_connectors.reporting.zmq_sockets import StreamSettings
    except ImportError as error:
        raise ConfigError(f"umbp follow needs pyzmq: pip install 'umbp-connectors[zmq]' ({error})") from error
    return StreamSettings(endpoint_of(endpoint, rank, bind), endpoint_of(replay, rank) if replay else "", topic, bind)


def _server(text: str) -> tuple[str, int]:
    from umbp_connectors.master.settings import parse_endpoint

    try:
        return parse_endpoint(text)
    except ValueError as error:
        raise ConfigError(f"--http {text!r} is no server of an engine: {error}") from None


def _config(access: MasterAccess, node_id: str, tags: tuple[str, ...]) -> UmbpConfig:
    """What a plug-in in the engine would have for a configuration, with the options of this command in it."""
    from umbp_connectors.config import COMMAND_LINE, resolve

    ca, certificate, key = access.tls_files
    given: dict[str, Any] = {
        "master_address": access.master,
        "master_token_file": access.token_file,
        "master_tls_ca": ca,
        "master_client_cert": certificate,
        "master_client_key": key,
        "node_id": node_id,
        "node_tags": ",".join(tags),
    }
    return resolve({name: str(value) for name, value in given.items() if value}, giver=COMMAND_LINE).config


def _reporter(config: UmbpConfig, facts: NodeFacts) -> Reporter:
    from umbp_connectors.reporting.opening import open_reporter

    reporter = open_reporter(config, facts)
    if reporter is None:
        raise ConfigError("reporting is switched off (UMBP_REPORT=0), and umbp follow does nothing else; unset it")
    return reporter


def _follower(stream: StreamSettings, reporter: Reporter, grace: float) -> Follower:
    from umbp_connectors.reporting.zmq_follower import Follower, Patience
    from umbp_connectors.reporting.zmq_sockets import EngineStream

    return Follower(EngineStream(stream), reporter, Patience(grace=grace))


def _run(pairs: Sequence[tuple[Follower, Reporter]], timeout: float) -> None:
    """Follow until a signal comes.  The main thread only.  Raises what a follower raises."""
    from umbp_connectors.reporting.zmq_meter import FollowMeter

    ended: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put may interrupt its get in the same thread

    def signalled(_number: int, _frame: FrameType | None) -> None:
        ended.put(None)

    before = {number: signal.signal(number, signalled) for number in (signal.SIGTERM, signal.SIGINT)}
    meters = [FollowMeter(follower, reporter) for follower, reporter in pairs]
    with ThreadPoolExecutor(len(pairs), thread_name_prefix="umbp-follow") as threads:
        for _, reporter in pairs:
            reporter.start()
        runs = [threads.submit(follower.run) for follower, _ in pairs]
        for run in runs:
            run.add_done_callback(lambda _: ended.put(None))
        try:
            while not _told(ended, METRICS_INTERVAL):
                for meter in meters:
                    meter.send(timeout)
        finally:
            for follower, _ in pairs:
                follower.stop()
            for number, handler in before.items():
                signal.signal(number, handler)
        for run in runs:
            run.result()


def _told(ended: queue.SimpleQueue[None], timeout: float) -> bool:
    try:
        ended.get(timeout=timeout)
    except queue.Empty:
        return False
    return True
