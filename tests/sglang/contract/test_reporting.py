"""What reporting rests on in the installed SGLang: its events, who may publish them, and where namespaces are known."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import struct
from pathlib import Path
from typing import Any

import pytest
import sglang
from sglang.srt.disaggregation import kv_events
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, StorageMedium
from sglang.srt.managers.scheduler_components.kv_events_publisher import SchedulerKvEventsPublisher
from sglang.srt.mem_cache import utils
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.events import KVCacheEventRecorder, KvEventLoraNames
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import PrefetchOperation
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.rust_tree_core import adapter
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeCore
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import BufferBackupSnapshot
from sglang.srt.runtime_context import describe_kv_events_publisher
from sglang.srt.server_args import ServerArgs

from umbp_sglang.reporting_hooks import EVENTS

SRT = Path(sglang.__file__).parent / "srt"


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def fields(kind: Any) -> set[str]:
    return set(kind.__struct_fields__)


def test_events_have_what_is_read_of_them() -> None:
    assert {"block_hashes", "medium"} <= fields(BlockStored)
    assert {"block_hashes", "medium"} <= fields(BlockRemoved)
    assert fields(AllBlocksCleared) == set()
    assert {each.name: each.value for each in StorageMedium} == {
        "GPU": "GPU",
        "CPU": "CPU_PINNED",
        "DISK": "DISK",
        "EXTERNAL": "EXTERNAL",
    }


def test_two_media_are_ever_told() -> None:
    """Should SGLang tell of L3 itself one day, it would be told twice by different names for the tiers."""
    told = set()
    for file in [*SRT.glob("mem_cache/*.py"), *SRT.glob("mem_cache/unified_cache/**/*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        told |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_medium(node.value)}
    assert told == {"GPU", "CPU"}


def _is_medium(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "StorageMedium"


def test_the_component_that_publishes() -> None:
    parts = {each.name for each in dataclasses.fields(SchedulerKvEventsPublisher)}
    assert {"kv_events_config", "tree_cache", "send_metrics_from_scheduler"} <= parts
    assert {"enable_kv_cache_events", "kv_event_publisher"} <= parts
    source = inspect.getsource(SchedulerKvEventsPublisher.emit_kv_metrics)
    assert "if not self.send_metrics_from_scheduler.closed:" in source, "what stands in for a socket says that it is"
    source = inspect.getsource(SchedulerKvEventsPublisher.publish_kv_events)
    assert "self.tree_cache.take_events()" in source


def test_events_are_published_when_idle_and_after_each_prefill() -> None:
    """And every so many steps of decoding, which is why a hook does it after each."""
    scheduler = (SRT / "managers/scheduler.py").read_text(encoding="utf-8")
    reporter = (SRT / "managers/scheduler_components/metrics_reporter.py").read_text(encoding="utf-8")
    assert scheduler.count("self.kv_events_publisher.publish_kv_events()") == 2
    assert reporter.count("self.scheduler.kv_events_publisher.publish_kv_events()") == 2
    assert "if self.forward_ct_decode % self.decode_log_interval != 0:\n            return" in reporter


def test_what_we_ask_for_is_announced_to_nobody() -> None:
    """Routers that read ``/server_info`` would wait for a socket that nobody opens."""
    arguments = ServerArgs(model_path="dummy", page_size=64, kv_events_config=EVENTS)
    assert describe_kv_events_publisher(arguments) is None
    assert kv_events.KVEventsConfig.from_cli(EVENTS).publisher == "umbp"


def test_arguments_may_be_set_before_they_are_resolved() -> None:
    arguments = ServerArgs(model_path="dummy")
    for name in ("enable_hierarchical_cache", "hicache_storage_backend", "hicache_storage_backend_extra_config"):
        getattr(arguments, name)
    arguments.kv_events_config = EVENTS
    assert arguments.kv_events_config == EVENTS
    assert names(ServerArgs.resolve_once) == ["self"]


@pytest.mark.parametrize("core", [UnifiedTreeCore, adapter.RustUnifiedTreeCore])
def test_both_trees_tell_the_namespace_of_a_node(core: Any) -> None:
    assert names(core.prefetch_anchor_info) == ["self", "node_id"]
    assert names(core.build_storage_backup_spec) == ["self", "node_id", "pass_prefix_keys"]
    assert names(core.snapshot_buffer_backup) == ["self", "node_id", "pass_prefix_keys"]
    assert {"key", "parent_last_hash", "hash_values"} <= fields(BufferBackupSnapshot)
    operation = PrefetchOperation(CacheRequestHandle("r", 0), RadixKey([]), "the page before")
    assert (operation.last_hash, operation.all_hash_values) == ("the page before", None)
    assert operation.token_ids.extra_key is None


def test_where_the_table_of_adapters_is() -> None:
    assert "self._lora_names" in inspect.getsource(adapter._RustKVCacheEventRecorder.__init__)
    assert "self._dynamo_format" in inspect.getsource(adapter._RustKVCacheEventRecorder.__init__)
    recorder = KVCacheEventRecorder(enabled=True, page_size=1, lora_names=KvEventLoraNames())
    assert recorder.lora_names.get("x") is recorder.lora_names.resolve("x") is None
    assert recorder.dynamo_format is False


def test_both_chains_of_a_salted_request() -> None:
    key = RadixKey([1, 2, 3, 4], extra_key="k", cache_salt="s")
    stored = utils.get_storage_hash_str(key, None, 2)
    seed = utils.storage_namespace_seed("k", "s")
    assert stored == utils.get_hash_str(key, seed, 2)
    salt = hashlib.sha256(b"sglang-cache-salt-v1\0s").hexdigest()
    assert 'b"sglang-cache-salt-v1\\0"' in inspect.getsource(utils.compute_node_event_hash_values)
    assert utils.get_hash_str(key, salt, 2) != stored
    (number,) = struct.unpack(">q", bytes.fromhex(stored[0])[:8])
    assert utils.hash_str_to_int64(stored[0]) == number


def test_names_that_are_published_for_a_namespace() -> None:
    assert names(kv_events.namespaced_block_hash) == ["block_hash", "namespace_seed"]
    assert names(kv_events.kv_event_namespace_seed) == ["extra_key", "cache_salt"]
    assert kv_events.namespaced_block_hash(7, namespace_seed=None) == 7
