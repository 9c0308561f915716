"""What the hooks of reporting do in their places, and that nothing they do reaches SGLang when it goes wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.kv_events import EventPublisher, EventPublisherFactory, KVEventBatch, NullEventPublisher
from sglang.srt.server_args import ServerArgs

import umbp_sglang
from umbp_sglang import reporting_hooks
from umbp_sglang.publisher import UmbpEventPublisher
from umbp_sglang.reporting import NodeReporting, keep_reporting, kept_reporting, open_reporting
from umbp_sglang.reporting_hooks import EVENTS
from umbp_sglang.settings import StoreSettings, read_settings

MASTER = "umbp://127.0.0.1:1"
"""Where nobody listens."""


def arguments(extra: dict[str, object] | None = None, **given: Any) -> ServerArgs:
    base: dict[str, Any] = {"enable_hierarchical_cache": True, "hicache_storage_backend": "umbp"}
    if extra is not None:
        base["hicache_storage_backend_extra_config"] = json.dumps(extra)
    return ServerArgs(model_path="dummy", **(base | given))


def asked(given: ServerArgs) -> str | None:
    reporting_hooks.ask_for_events(given)
    return given.kv_events_config


def test_events_are_asked_for_when_a_master_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(arguments({"master_address": MASTER})) == EVENTS
    assert asked(arguments({"dram_capacity": "1GiB"})) is None
    assert asked(arguments({"master_address": MASTER, "report": False})) is None
    assert asked(arguments({"master_address": MASTER}, enable_hierarchical_cache=False)) is None
    assert asked(arguments({"master_address": MASTER}, hicache_storage_backend="file")) is None
    assert asked(arguments({"master_address": MASTER, "dram_capacity": "?"})) is None, (
        "the store will say what is wrong"
    )
    dynamic = {"master_address": MASTER, "backend_name": "umbp", "module_path": "umbp_sglang.store"}
    assert asked(arguments(dynamic, hicache_storage_backend="dynamic")) == EVENTS
    monkeypatch.setenv("UMBP_MASTER_ADDRESS", MASTER)
    assert asked(arguments()) == EVENTS
    monkeypatch.setenv("UMBP_REPORT", "0")
    assert asked(arguments()) is None


def test_what_the_user_says_of_events_stays(tmp_path: Path) -> None:
    theirs = '{"publisher": "null"}'
    assert asked(arguments({"master_address": MASTER}, kv_events_config=theirs)) == theirs
    file = tmp_path / "extra.json"
    file.write_text(json.dumps({"master_address": MASTER}))
    assert asked(arguments(None, hicache_storage_backend_extra_config=f"@{file}")) == EVENTS


@pytest.fixture
def reporting() -> Iterator[NodeReporting]:
    config = settings({"master_address": MASTER}).config
    found = open_reporting(config, "model", 64)
    assert found is not None
    yield found
    found.close()


def settings(extra: dict[str, object]) -> StoreSettings:
    from tests.sglang.store.pools import storage_config

    return read_settings(storage_config(extra=extra))


class Recorded(EventPublisher):
    """A publisher of SGLang's."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.ended = False

    def publish(self, events: Any) -> None:
        self.batches.append(events)

    def shutdown(self) -> None:
        self.ended = True

    def describe_local_source(self, block_size: int) -> dict[str, Any]:
        return {"block_size": block_size}


def component(publisher: Any, reporting: NodeReporting | None, config: str = EVENTS, enabled: bool = True) -> Any:
    backend = SimpleNamespace(reporting=reporting)
    cache = SimpleNamespace(cache_controller=SimpleNamespace(storage_backend=backend), tree_core=None, page_size=64)
    return SimpleNamespace(
        kv_event_publisher=publisher,
        tree_cache=cache,
        enable_kv_cache_events=enabled,
        kv_events_config=config,
        send_metrics_from_scheduler="a socket",
        publish_kv_events=lambda: None,
    )


@pytest.mark.usefixtures("registries")
def test_the_factory_makes_ours() -> None:
    umbp_sglang.register()
    assert isinstance(EventPublisherFactory.create(EVENTS, 0), UmbpEventPublisher)


def test_ours_is_bound_to_what_the_store_reports_with(reporting: NodeReporting) -> None:
    part = component(UmbpEventPublisher(), reporting)
    reporting_hooks.follow_events(None, part, EVENTS)
    assert part.kv_event_publisher.reporting is reporting
    assert part.send_metrics_from_scheduler.closed, "nobody would read what SGLang sends there"
    part.kv_event_publisher.publish(KVEventBatch(ts=0.0, events=[]))
    part.kv_event_publisher.shutdown()
    assert reporting.ended, "nothing else had something to tell"


def test_sglangs_own_publisher_goes_on(reporting: NodeReporting) -> None:
    theirs = Recorded()
    part = component(theirs, reporting, '{"publisher": "zmq"}')
    reporting_hooks.follow_events(None, part, part.kv_events_config)
    ours = part.kv_event_publisher
    assert isinstance(ours, UmbpEventPublisher)
    batch = KVEventBatch(ts=0.0, events=[])
    ours.publish(batch)
    assert theirs.batches == [batch]
    assert ours.describe_local_source(64) == {"block_size": 64}
    assert part.send_metrics_from_scheduler == "a socket"
    ours.shutdown()
    assert theirs.ended


def test_ranks_without_events_and_stores_of_others_are_left_alone(reporting: NodeReporting) -> None:
    silent = component(None, reporting, enabled=False)
    reporting_hooks.follow_events(None, silent, None)
    assert silent.kv_event_publisher is None
    other = component(NullEventPublisher(), None)
    reporting_hooks.follow_events(None, other, None)
    assert isinstance(other.kv_event_publisher, NullEventPublisher)


def test_without_a_store_the_environment_may_name_a_master(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = SimpleNamespace(served_model_name="m", host="127.0.0.1", port=30000)
    monkeypatch.setattr("sglang.srt.runtime_context.get_serving", lambda: serving)
    part = component(UmbpEventPublisher(), None)
    reporting_hooks.follow_events(None, part, EVENTS)
    assert part.kv_event_publisher.reporting is None, "no master"
    monkeypatch.setenv("UMBP_MASTER_ADDRESS", MASTER)
    reporting_hooks.follow_events(None, part, EVENTS)
    assert part.kv_event_publisher.reporting is not None
    part.kv_event_publisher.shutdown()


def test_decoding_publishes_each_step_where_we_asked_for_events() -> None:
    calls: list[str] = []
    for config in (EVENTS, '{"publisher": "zmq"}'):
        publisher = SimpleNamespace(
            kv_events_config=config, publish_kv_events=lambda config=config: calls.append(config)
        )
        reporting_hooks.publish_each_step(
            None, SimpleNamespace(scheduler=SimpleNamespace(kv_events_publisher=publisher))
        )
    assert calls == [EVENTS]


@pytest.mark.parametrize(
    "hook",
    [
        reporting_hooks.ask_for_events,
        reporting_hooks.publish_each_step,
        reporting_hooks.describe_backup,
        reporting_hooks.describe_buffered,
        reporting_hooks.describe_query,
        reporting_hooks.follow_events,
    ],
)
def test_what_goes_wrong_in_a_hook_stays_there(hook: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """An SGLang of another shape: objects that have nothing that is looked for."""
    fresh = reporting_hooks.quiet(hook.__wrapped__)  # type: ignore[attr-defined]
    for _ in range(3):
        fresh(object(), object())
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [hook.__name__ in record.getMessage() for record in errors] == [True], "once"


def test_reporting_is_kept_with_the_caches_until_it_ends(reporting: NodeReporting) -> None:
    owner = SimpleNamespace()
    assert kept_reporting(owner) is None
    keep_reporting(owner, reporting)
    assert kept_reporting(owner) is reporting
    reporting.close()
    assert kept_reporting(owner) is None
