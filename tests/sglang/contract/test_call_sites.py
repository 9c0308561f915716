"""The places in the installed SGLang that call a storage backend or choose by its name, looked up in its source."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import sglang

SRT = Path(sglang.__file__).parent / "srt"
LOOK = (
    "SGLang {version} differs in {file}: {what}. Read the place, bring umbp_sglang up to date, then correct this table."
)

CALLS: dict[str, set[tuple[str, int, tuple[str, ...]]]] = {
    "managers/cache_controller.py": {
        ("batch_exists", 2, ()),
        ("batch_get", 2, ()),
        ("batch_get_v1", 3, ()),
        ("batch_get_v2", 1, ("extra_info",)),
        ("batch_set", 2, ()),
        ("batch_set_v1", 3, ()),
        ("close", 0, ()),
        ("on_host_pools_registered", 0, ()),
        ("register_mem_pool_host", 1, ()),
    },
    "mem_cache/hybrid_cache/hybrid_cache_controller.py": {
        ("batch_exists", 2, ()),
        ("batch_exists_v2", 3, ()),
        ("batch_get_v2", 1, ("extra_info",)),
        ("batch_set_v2", 1, ("extra_info",)),
        ("clear", 0, ()),
        ("on_host_pools_registered", 0, ()),
        ("register_mem_host_pool_v2", 2, ()),
    },
    "mem_cache/unified_radix_cache.py": {("get_stats", 0, ())},
    "managers/scheduler.py": {
        ("describe_l3_object_layout", 0, ("page_size", "sidecar_pool_specs", "swa_trailing_pages"))
    },
}
"""File -> every call of a method of the backend: its name, how many positional arguments, which keywords; 0.5.23."""
GUARDED = {"describe_l3_object_layout": "MooncakeStore"}
"""Called for backends of one class only, so ours need not have it."""
ELSEWHERE = ("mem_cache/storage/", "mem_cache/hicache_storage.py")
"""The backends themselves."""

ZERO_COPY = {
    "hf3fs",
    "mooncake",
    "npu_memcache",
    "eic",
    "nixl",
    "simm",
    "mori",
    "tensorcast",
    "seaweedfs",
}
"""Backends by whose name the controller chooses v1; a hook adds ours."""
BY_NAME: dict[str, set[str]] = {
    "arg_groups/hicache_hook.py": {"mooncake", "npu_memcache"},
    "arg_groups/kv_cache_hook.py": {"file"},
    "distributed/device_communicators/mooncake_transfer_engine.py": {"mooncake"},
    "managers/cache_controller.py": {"dynamic", "file", "mooncake"} | ZERO_COPY,
    "mem_cache/hybrid_cache/hybrid_cache_controller.py": {"mooncake", "mori"},
}
"""File -> the names of backends that it compares with the one in use: what SGLang does for these and not for ours."""
COMPARED = {"storage_backend", "storage_backend_type", "hicache_storage_backend"}
POPPED = {
    "hicache_storage_pass_prefix_keys",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "tp_lcm_size",
}
"""Keys of the extra config that SGLang takes out before a backend sees it."""


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((SRT / file).read_text(encoding="utf-8"))


def look(file: str, what: str) -> str:
    return LOOK.format(version=sglang.__version__, file=file, what=what)


def backend_calls(module: ast.Module) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Calls of ``storage_backend.name(...)``, whatever the object is called before it."""
    for node in ast.walk(module):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
        if name == "storage_backend":
            keywords = tuple(sorted(keyword.arg or "**" for keyword in node.keywords))
            yield node.func.attr, len(node.args), keywords


@pytest.mark.parametrize("file", CALLS)
def test_the_backend_is_called_as_we_know(file: str) -> None:
    assert set(backend_calls(tree(file))) == CALLS[file], look(file, "how it calls the storage backend")


def test_the_backend_is_called_nowhere_else() -> None:
    found = set()
    for path in SRT.rglob("*.py"):
        name = path.relative_to(SRT).as_posix()
        text = path.read_text(encoding="utf-8")
        if name.startswith(ELSEWHERE) or "storage_backend." not in text or name in CALLS:
            continue
        found |= {(name, call) for call in backend_calls(ast.parse(text))}
    assert found == set()


@pytest.mark.parametrize("method", GUARDED)
def test_what_we_do_not_have_is_asked_of_others_only(method: str) -> None:
    """The call stands behind ``isinstance(storage_backend, ...)`` in the same function."""
    for function in ast.walk(tree("managers/scheduler.py")):
        if isinstance(function, ast.FunctionDef) and method in {name for name, _, _ in backend_calls(function)}:
            source = ast.unparse(function)
            assert f"isinstance(storage_backend, {GUARDED[method]})" in source


def strings_of(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def function_of(file: str, name: str) -> ast.FunctionDef:
    found = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef) and node.name == name]
    assert len(found) == 1, look(file, f"{name} is there {len(found)} times")
    return found[0]


def test_the_zero_copy_interface_is_chosen_by_this_list() -> None:
    file = "managers/cache_controller.py"
    lists = [
        strings_of(node) for node in ast.walk(function_of(file, "attach_storage_backend")) if isinstance(node, ast.List)
    ]
    assert ZERO_COPY in lists, look(file, "the list of backends with zero copy")
    text = ast.unparse(function_of(file, "attach_storage_backend"))
    assert "self.page_get_func = self._page_get_zero_copy" in text
    assert "self.page_set_func = self._page_set_zero_copy" in text
    assert "self.storage_config.extra_config.get('interface_v1', 0)" in text, look(file, "how dynamic chooses v1")


def names_compared(module: ast.Module) -> set[str]:
    """The texts that the name of the backend in use is compared with."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Compare):
            sides = {getattr(side, "attr", getattr(side, "id", "")) for side in (node.left, *node.comparators)}
            found |= strings_of(node) if sides & COMPARED else set()
    return found


def test_what_is_decided_by_a_backends_name_is_what_we_know() -> None:
    found = {}
    for path in SRT.rglob("*.py"):
        name = path.relative_to(SRT).as_posix()
        text = path.read_text(encoding="utf-8")
        if not name.startswith(ELSEWHERE) and "storage_backend" in text:
            found[name] = names_compared(ast.parse(text))
    assert {name: names for name, names in found.items() if names} == BY_NAME, look(
        "these files", "its choices by name"
    )


def test_answers_name_the_class_of_the_backend() -> None:
    """What users read as ``storage_backend`` of ``cached_tokens_details``."""
    file = "managers/scheduler_components/output_streamer.py"
    assert "type(storage_backend).__name__" in ast.unparse(function_of(file, "_get_storage_backend_type"))
    assert "storage_backend" in strings_of(function_of(file, "get_cached_tokens_details"))


def test_threads_start_after_the_interface_was_chosen() -> None:
    """The hook that chooses v1 for us stands before ``_start_storage_threads``, the last step of an attach."""
    text = ast.unparse(function_of("managers/cache_controller.py", "attach_storage_backend"))
    assert 0 < text.index("_page_get_zero_copy") < text.index("self._start_storage_threads()")


def test_sglang_takes_out_the_keys_that_we_let_pass() -> None:
    from umbp_sglang.settings import ENGINE_KEYS

    parse = function_of("mem_cache/hybrid_cache/hybrid_cache_controller.py", "parse_storage_backend_extra_config")
    generate = function_of("managers/cache_controller.py", "_generate_storage_config")
    popped = {
        node.args[0].value
        for function in (parse, generate)
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "pop"
        and isinstance(node.args[0], ast.Constant)
    }
    assert popped == POPPED
    assert popped <= ENGINE_KEYS


def test_side_pools_are_written_before_the_anchor() -> None:
    """What the store's two-step publication of a sidecar and its anchor stands on."""
    text = ast.unparse(
        function_of("mem_cache/hybrid_cache/hybrid_cache_controller.py", "_page_backup_with_stable_layout")
    )
    assert 0 < text.index("batch_set_v2") < text.index("super()._page_backup(operation)")


def test_exceptions_of_a_backend_are_caught_and_hangs_are_not() -> None:
    """Why a raise is a miss here, and why every call of ours has a deadline of its own."""
    controller = "managers/cache_controller.py"
    for name in ("_page_transfer", "_page_backup_or_log", "prefetch_thread_func"):
        handlers = [node for node in ast.walk(function_of(controller, name)) if isinstance(node, ast.ExceptHandler)]
        assert any(isinstance(h.type, ast.Name) and h.type.id == "Exception" for h in handlers), look(controller, name)
    stop = ast.unparse(function_of(controller, "_stop_storage_threads"))
    assert "join(timeout=10)" in stop
