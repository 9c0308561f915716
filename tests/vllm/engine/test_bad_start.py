"""What is wrong at a start ends in one clear sentence, or in a smaller but correct service; nothing stored is lost."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine.local import Ask, Engine, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.engine.processes import in_child
from tests.vllm.models import prompt
from umbp_core.errors import ConfigError
from umbp_core.tiers import Tier

TEXT = prompt(200, seed=1)


@pytest.fixture
def sentences() -> Iterator[list[str]]:
    """Warnings and errors of our own loggers since the test began."""
    with listening() as collected:
        yield collected


@contextmanager
def listening() -> Iterator[list[str]]:
    """What our loggers warn about, as it comes.  By the record factory, because vLLM replaces handlers at its start."""
    collected: list[str] = []
    make = logging.getLogRecordFactory()

    def collect(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = make(*arguments, **more)
        if record.levelno >= logging.WARNING and "umbp" in record.name:
            collected.append(record.getMessage())
        return record

    logging.setLogRecordFactory(collect)
    try:
        yield collected
    finally:
        logging.setLogRecordFactory(make)


def still_serves(opened: Engine, right: tuple[int, ...]) -> None:
    """DRAM hits work, and the tokens are right."""
    ask = Ask(TEXT)
    cold = opened.ask_one(ask)
    opened.forget()
    hit = opened.ask_one(ask)
    assert cold.tokens == hit.tokens == right
    assert hit.cached == 192


@pytest.fixture(scope="module")
def right(oracle: Oracle, llama: Path) -> tuple[int, ...]:
    """The tokens of ``TEXT``."""
    return oracle.ask(llama, Ask(TEXT))[0].tokens


def test_missing_folder_is_made(llama: Path, right: tuple[int, ...], tmp_path: Path, sentences: list[str]) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    with engine(llama, kv_transfer_config=pool(folder)) as opened:
        still_serves(opened, right)
        assert opened.leader.pool.objects(Tier.SSD) >= 6
    assert sentences == []


def test_a_file_instead_of_a_folder(llama: Path, right: tuple[int, ...], tmp_path: Path, sentences: list[str]) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("mine")
    with engine(llama, kv_transfer_config=pool(in_the_way)) as opened:
        still_serves(opened, right)
    assert_one_sentence(sentences, str(in_the_way))
    assert in_the_way.read_text() == "mine"


def test_read_only_folder(llama: Path, right: tuple[int, ...], tmp_path: Path, sentences: list[str]) -> None:
    folder = tmp_path / "ssd"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() == 0:
        folder = Path("/sys/umbp")  # root may write to any folder of a real file system
    with engine(llama, kv_transfer_config=pool(folder)) as opened:
        still_serves(opened, right)
    assert_one_sentence(sentences, str(folder))


def test_full_disk(
    llama: Path, right: tuple[int, ...], tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with engine(llama, kv_transfer_config=pool(tmp_path)) as opened:
        still_serves(opened, right)
    assert_one_sentence(sentences, str(tmp_path))


def test_foreign_files_stay_untouched(llama: Path, right: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "slab-1.bin").write_bytes(b"not ours")
    for _ in range(2):
        with engine(llama, kv_transfer_config=pool(tmp_path)) as opened:
            still_serves(opened, right)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert (tmp_path / "rank0" / "slab-1.bin").read_bytes() == b"not ours"


def test_second_engine_on_the_same_folder(
    llama: Path, right: tuple[int, ...], tmp_path: Path, sentences: list[str]
) -> None:
    """The second one works without SSD and says so; the first one's objects are not harmed."""
    with engine(llama, kv_transfer_config=pool(tmp_path)) as first:
        still_serves(first, right)
        told, reply = in_child(_second_engine, llama, tmp_path)
        again = first.ask_one(Ask(TEXT))
    assert reply == again.tokens == right
    assert sentences == []
    assert_one_sentence(told, str(tmp_path))
    with engine(llama, kv_transfer_config=pool(tmp_path)) as third:
        assert third.ask_one(Ask(TEXT)).cached == 192


def _second_engine(model: Path, ssd_dir: Path) -> tuple[list[str], tuple[int, ...]]:
    with listening() as collected, engine(model, kv_transfer_config=pool(ssd_dir)) as opened:
        tokens = opened.ask_one(Ask(TEXT)).tokens
    return collected, tokens


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_corrupt_catalogue(
    llama: Path, right: tuple[int, ...], tmp_path: Path, sentences: list[str], damage: str
) -> None:
    with engine(llama, kv_transfer_config=pool(tmp_path)) as first:
        still_serves(first, right)
    (catalogue,) = tmp_path.rglob("catalogue-*.sqlite")
    content = catalogue.read_bytes()
    damaged = {"garbage": b"\xa5" * len(content), "truncated": content[: len(content) // 2], "empty": b""}
    catalogue.write_bytes(damaged[damage])
    with engine(llama, kv_transfer_config=pool(tmp_path)) as second:
        still_serves(second, right)
    if damage != "empty":
        assert_one_sentence(sentences, str(catalogue))
    with engine(llama, kv_transfer_config=pool(tmp_path)) as third:
        reply = third.ask_one(Ask(TEXT))
    assert (reply.tokens, reply.cached) == (right, 192)


def test_ssd_capacity_of_less_than_one_block(
    llama: Path, right: tuple[int, ...], tmp_path: Path, sentences: list[str]
) -> None:
    with engine(llama, kv_transfer_config=pool(tmp_path, ssd_capacity=1000)) as opened:
        still_serves(opened, right)
    assert_one_sentence(sentences, "1000")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dram_capacity": "64PiB"}, "dram_capacity"),
        ({"dram_capacity": 1000}, "dram_capacity"),
        ({"dram_capacity": "plenty"}, "dram_capacity"),
        ({"dram_capacty": "1GiB"}, "dram_capacity"),
        ({"eviction_policy": "random"}, "eviction_policy"),
        ({"mode": "distributed"}, "mode"),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.statement("connector", 74)
def test_configuration_that_cannot_work_stops_the_start(llama: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised, engine(llama, kv_transfer_config=pool(**settings)):
        pass
    assert len(str(raised.value)) < 500


def assert_one_sentence(sentences: list[str], about: str) -> None:
    """Exactly one message, and it names what is wrong."""
    assert len(sentences) == 1, sentences
    assert about in sentences[0]
