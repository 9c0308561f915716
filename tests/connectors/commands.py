"""Commands of ``umbp``, run in this process."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from umbp_connectors import cli


def umbp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """The exit code of ``umbp`` with ``arguments``, and what it says, as a value when it was asked for JSON."""
    monkeypatch.setattr(sys, "argv", ["umbp", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr()
    said = json.loads(told.out) if "--json" in arguments and told.out else told.out + told.err
    return int(end.value.code or 0), said
