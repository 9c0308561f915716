"""Weights of a local folder, where both engines' adapters look at them."""

from __future__ import annotations

from pathlib import Path

from umbp_connectors.model_origin import model_origin


def test_what_is_no_file_is_no_weight(tmp_path: Path) -> None:
    """A link that leads nowhere, or a folder: an engine starts with them, and so do we."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 1000)
    before = model_origin(str(tmp_path), None)
    (tmp_path / "old.bin").symlink_to(tmp_path / "nowhere")
    (tmp_path / "older.pt").mkdir()
    assert model_origin(str(tmp_path), None) == before
    (tmp_path / "older.pt" / "more.bin").write_bytes(b"more")
    (tmp_path / "old.bin").unlink()
    (tmp_path / "old.bin").symlink_to(tmp_path / "older.pt" / "more.bin")
    assert model_origin(str(tmp_path), None) != before
