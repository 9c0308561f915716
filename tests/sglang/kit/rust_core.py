"""SGLang's Rust tree, which servers use, for a kit that wants to look into it.

The kit's own view of it needs an extension that is built from SGLang's sources.  The released one tells enough for
what is done here; what it does not tell is not asked.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any
from unittest import mock

from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
from sglang.test.kits.unified_radix_cache.unified_tree_core_inspection_interface import (
    UnifiedTreeCoreInspectionInterface,
)

_KITS_OWN = "sglang.test.kits.unified_radix_cache.rust_unified_tree_core_inspector"


class ReleasedRustCore(RustUnifiedTreeCore, UnifiedTreeCoreInspectionInterface):
    """The tree of the released package."""

    def get_parent_node_id(self, node_id: Any) -> Any:
        """The node before it; ``None`` for the root."""
        path = self.collect_path_info([node_id])[0]
        return path[-1].parent_id if path else None

    def get_node_key_length(self, node_id: Any) -> int:
        """Tokens of the node."""
        (*_, info) = self.collect_path_info([node_id])[0]
        return int(info.path_end - info.path_start)

    def build_backup_node_ids(self, node_id: Any, write_back: bool) -> list[Any]:
        """The nodes that are copied to the host with it."""
        return list(self.build_backup_kv_action(node_id).node_ids)


ReleasedRustCore.__abstractmethods__ = frozenset()


def as_the_kits() -> Any:
    """While it is entered, the kit makes this tree when it is asked for a Rust one."""
    module = ModuleType(_KITS_OWN)
    module.RustUnifiedTreeCoreInspector = ReleasedRustCore  # type: ignore[attr-defined]
    return mock.patch.dict(sys.modules, {_KITS_OWN: module})
