"""Everything in the installed vLLM that changes what a block is cached for is something we watch."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, maybe_convert_block_hash

from umbp_vllm import block_hooks, compat
from umbp_vllm.published import hash_form

CORE = Path(vllm.__file__).parent / "v1" / "core"
CHANGES = {"insert", "pop", "set_block_hash", "reset_hash"}
"""What changes a hash: of ``cached_block_hash_to_block`` and of a block."""
WATCHED = {
    "cache_full_blocks",
    "cache_partial_block",
    "evict_blocks",
    "get_new_blocks",
    "move_block_hashes",
    "reset_prefix_cache",
}
PASSED_BY = {("single_type_kv_cache_manager.py", "MambaManager")}
"""Classes that reach past these methods; models that need them are refused at start."""


def called(function: ast.AST) -> Iterator[tuple[str, str]]:
    """(what it is called on, its name) for every call of a method."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield ast.unparse(node.func.value), node.func.attr


def pool_methods() -> dict[str, ast.FunctionDef]:
    tree = ast.parse((CORE / "block_pool.py").read_text())
    (pool,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "BlockPool")
    return {node.name: node for node in pool.body if isinstance(node, ast.FunctionDef)}


def test_the_methods_that_change_hashes_are_those_that_are_watched() -> None:
    methods = pool_methods()
    changing: set[str] = set()
    while True:
        more = {
            name
            for name, method in methods.items()
            for owner, callee in called(method)
            if (owner == "self" and callee in changing)
            or (callee in CHANGES and (owner in {"block", "blk"} or owner.endswith("cached_block_hash_to_block")))
        }
        if more == changing:
            break
        changing = more
    version = compat.vllm_version()
    public = {name for name in changing if not name.startswith("_")}
    assert public == WATCHED, f"vLLM {version}: {sorted(public ^ WATCHED)} in v1/core/block_pool.py; see block_hooks"
    assert "reset_prefix_cache" in changing, "the search itself works"


def test_nobody_reaches_past_the_watched_methods() -> None:
    found = {
        (file.name, node.name)
        for file in CORE.glob("*.py")
        if file.name != "block_pool.py"
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
        if any(owner.endswith("block_pool") and name.startswith("_") for owner, name in called(node))
    }
    assert found <= PASSED_BY, (
        f"vLLM {compat.vllm_version()} changes hashes in {sorted(found - PASSED_BY)}; see block_hooks"
    )


def test_the_installed_block_pool_can_be_watched() -> None:
    pool = BlockPool(4, True, 16)
    assert block_hooks.cannot_watch(pool) is None
    block_hooks.watch_blocks(pool, lambda blocks: None, lambda: None)
    assert vars(pool).keys() >= WATCHED


def test_blocks_say_their_number_and_their_hash() -> None:
    block = KVCacheBlock(3)
    assert (block.block_id, block.block_hash) == (3, None)
    block.set_block_hash(b"hash" + bytes(4), num_tokens=16)
    assert block.block_hash == b"hash" + bytes(4)


def test_hashes_are_published_as_their_low_64_bits_or_whole() -> None:
    digest = bytes(range(32))
    if hash_form() == "int64":
        assert maybe_convert_block_hash(digest) == int.from_bytes(digest[-8:], "big")
    else:
        assert maybe_convert_block_hash(digest) == digest


def test_the_command_line_makes_its_arguments_by_the_method_that_we_extend() -> None:
    original = inspect.unwrap(EngineArgs.from_cli_args.__func__)
    assert list(inspect.signature(original).parameters) == ["cls", "args"]
    assert "from_cli_args" not in vars(AsyncEngineArgs)
