"""What pipeline stages tell each other before they map the daemon's memory: their parts of a page, or what is wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed import parallel_state

from umbp_core.errors import ConfigError
from umbp_vllm.host_stages import StagePages, largest, share_stages, stages_of, writer_of
from umbp_vllm.metadata import PROTOCOL_VERSION, RankHello

STAGES = (StagePages(b"a" * 32, 8192, (8000, 0), True), StagePages(b"b" * 32, 4096, (4000, 96), False))


class Group:
    """vLLM's pipeline group, with a thread for each rank."""

    def __init__(self, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._told: list[Any] = [None] * ranks
        self._all = threading.Barrier(ranks, timeout=60)
        self._rank = threading.local()
        monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
        group = SimpleNamespace(world_size=ranks, cpu_group=None)
        monkeypatch.setattr(parallel_state, "get_pp_group", lambda: group)
        monkeypatch.setattr(torch.distributed, "all_gather_object", self._gather)

    def _gather(self, told: list[Any], own: Any, group: Any) -> None:
        self._told[self._rank.number] = own
        self._all.wait()
        told[:] = self._told

    def share(self, *looks: Callable[[], StagePages]) -> list[Future[tuple[StagePages, ...]]]:
        """Have every rank share what it finds."""

        def run(number: int) -> tuple[StagePages, ...]:
            self._rank.number = number
            return share_stages(looks[number], len(looks))

        with ThreadPoolExecutor(len(looks)) as threads:
            return [threads.submit(run, number) for number in range(len(looks))]


def refuse() -> StagePages:
    raise ConfigError("KV group 0 is a MambaSpec")


def test_every_stage_hears_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share_stages(lambda: STAGES[0], 1) == STAGES[:1], "without a word to anybody"
    with pytest.raises(ConfigError, match="other 1 pipeline stage"):
        share_stages(lambda: STAGES[0], 2)
    heard = Group(2, monkeypatch).share(lambda: STAGES[0], lambda: STAGES[1])
    assert [each.result() for each in heard] == [STAGES, STAGES]


def test_a_stage_that_cannot_work_keeps_none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Group(2, monkeypatch).share(refuse, lambda: STAGES[1])
    assert [str(each.exception()) for each in heard] == [
        "KV group 0 is a MambaSpec",
        "2 pipeline stages, of which 1 can be used: KV group 0 is a MambaSpec",
    ]


def hello(rank: int, writer: int, pages: StagePages) -> RankHello:
    return RankHello(PROTOCOL_VERSION, rank, writer, b"", pages.layout, pages.page_bytes, 1, 0, 0, pages.object_bytes)


def test_the_leader_comes_to_the_same_from_what_the_ranks_say() -> None:
    hellos = [hello(rank, writer_of(STAGES, 2, rank)[0], STAGES[rank // 2]) for rank in range(4)]
    assert [each.writer_rank for each in hellos] == [0, 0, 2, 3]
    assert [writer_of(STAGES, 2, rank)[1] for rank in range(4)] == [0, 0, 1, 2]
    assert stages_of(hellos, 2) == STAGES
    assert largest(STAGES) == (8000, 96)
    with pytest.raises(ConfigError, match="pages of rank 3 are of another kind than those of rank 2"):
        stages_of([*hellos[:3], hello(3, 3, STAGES[0])], 2)
