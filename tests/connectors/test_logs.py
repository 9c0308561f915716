"""Our log lines go where the engine's go."""

import logging
from collections.abc import Iterator

import pytest

from umbp_connectors import logs


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture
def engine() -> Iterator[_Kept]:
    """The handler of an engine's logger; what the test changes is put back."""
    names = [*logs.PACKAGES, "engine-of-test", "engine-of-test.umbp"]
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    kept = _Kept()
    logging.getLogger("engine-of-test").addHandler(kept)
    yield kept
    for logger, level in before:
        logger.removeHandler(kept)
        logger.setLevel(level)


def test_lines_reach_the_engines_handler_once_and_from_the_level_on(engine: _Kept) -> None:
    for _ in range(2):
        logs.join("engine-of-test", "info")
    logging.getLogger("umbp_connectors.pool.arena").info("hello")
    logging.getLogger("umbp_connectors.pool.arena").debug("too quiet")
    logging.getLogger("engine-of-test.umbp.pool").info("from the adapter")
    logging.getLogger("engine-of-test.umbp.pool").debug("too quiet")
    assert engine.lines == ["umbp_connectors.pool.arena: hello", "engine-of-test.umbp.pool: from the adapter"]


def test_the_root_still_hears_them(engine: _Kept, caplog: pytest.LogCaptureFixture) -> None:
    logs.join("engine-of-test", "debug")
    logging.getLogger("umbp_core.x").debug("hello")
    assert "hello" in caplog.text
    assert engine.lines == ["umbp_core.x: hello"]
