"""What came and went with vLLM's versions, and which one is installed."""

from __future__ import annotations

from umbp_vllm import compat

NEVER = (99, 0)
ADDED: dict[str, tuple[int, int]] = {
    "bind_kv_cache_manager": (0, 30),
    "finish_forward": (0, 30),
    "get_transfer_results": (0, 30),
    "has_pending_block_frees": (0, 30),
    "register_finished_partial_tail": (0, 30),
    "reset_capture_state": (0, 30),
    "get_mem_pool_context": (0, 31),
    "get_external_cache_hit_sources": (0, 32),
    "get_loaded_kv_cache_group_ids": (0, 32),
    "restore_kv_caches": (0, 33),
    "supports_sleep_mode": (0, 33),
    "unregister_kv_caches": (0, 33),
}
"""Public members of ``KVConnectorBase_V1`` by the version that brought them; all others were there in 0.28."""
REMOVED: dict[str, tuple[int, int]] = {"prefer_cross_layer_blocks": (0, 29), "register_cross_layers_kv_cache": (0, 29)}
"""Those that went, by the first version without them."""


def installed_release() -> tuple[int, int]:
    """The major and minor number of the installed vLLM."""
    release = compat.release_of(compat.vllm_version())
    assert release is not None
    return release
