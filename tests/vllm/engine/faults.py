"""Faults that tests inject into a running engine, without any product code that knows of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.vllm.engine.local import BLOCK, Ask, Engine
from tests.vllm.models import prompt
from umbp_core.errors import TransferError


def stored(opened: Engine, blocks: int, seed: int) -> Ask:
    """A prompt of a little more than ``blocks`` blocks, which are in DRAM and not in vLLM."""
    ask = Ask(prompt(blocks * BLOCK + 5, seed=seed))
    opened.ask_one(ask)
    opened.forget()
    return ask


def break_scatter(monkeypatch: pytest.MonkeyPatch, opened: Engine, bad_page: int) -> None:
    """Copies towards HBM that touch ``bad_page`` fail, and leave garbage where they should have written."""
    scatter = opened.copier.scatter

    def broken(group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        if bad_page in pages:
            scatter(group, blocks, [bad_page] * len(blocks), fence)
            raise TransferError("the test broke this copy")
        scatter(group, blocks, pages, fence)

    monkeypatch.setattr(opened.copier, "scatter", broken)
