"""What ``umbp pool`` says of a catalogue and of an object in it, as values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umbp_connectors.pool.inspection import StoredCatalogue, StoredObject


def stats_of(catalogue: StoredCatalogue) -> dict[str, Any]:
    """How much a catalogue has."""
    objects = catalogue.objects()
    sizes = [_bytes_of(path) for path in _slabs(catalogue)]
    return {
        "catalogue": catalogue.name,
        "namespace": catalogue.namespace,
        "objects": len(objects),
        "bytes": sum(stored.nbytes for stored in objects) * (1 if catalogue.striped else catalogue.ranks),
        "slots": min(sizes) // catalogue.slot_bytes if sizes and catalogue.slot_bytes else None,
        "slot_bytes": catalogue.slot_bytes,
        "fill": sum(stored.nbytes for stored in objects) / (len(objects) * catalogue.slot_bytes) if objects else None,
        "ranks": catalogue.ranks,
        "file_bytes": sum(sizes) + _bytes_of(catalogue.path),
        "in_use": catalogue.in_use,
    }


def _slabs(catalogue: StoredCatalogue) -> Sequence[Path]:
    pairs = zip(catalogue.folders, catalogue.layouts, strict=False)
    paths = dict.fromkeys(folder / f"slab-{layout.hex()[:12]}.bin" for folder, layout in pairs)
    return [path for path in paths if path.exists()]


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def values_of(catalogue: StoredCatalogue, stored: StoredObject) -> dict[str, Any]:
    """One object."""
    return {
        "key": stored.key.hex(),
        "bytes": stored.nbytes,
        "depth": stored.depth,
        "slot": stored.slot,
        "written": stored.written,
        "tier": "SSD",
        "catalogue": catalogue.name,
        "namespace": catalogue.namespace,
    }
