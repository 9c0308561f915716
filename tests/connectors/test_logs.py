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
    """An engine's logger with a handler of its own; what the test changes is put back."""
    names = [*logs.PACKAGES, "engine-of-test"]
    before = [(logging.getLogger(n), logging.getLogger(n).level, logging.getLogger(n).propagate) for n in names]
    kept = _Kept()
    logging.getLogger("engine-of-test").addHandler(kept)
    yield kept
    for logger, level, propagate in before:
        logger.handlers = []
        logger.setLevel(level)
        logger.propagate = propagate


def test_lines_reach_the_engines_handler_from_the_level_on(engine: _Kept) -> None:
    for _ in range(2):
        logs.join("engine-of-test", "info")
    logging.getLogger("umbp_connectors.pool.arena").info("hello")
    logging.getLogger("umbp_connectors.pool.arena").debug("too quiet")
    assert engine.lines == ["umbp_connectors.pool.arena: hello"]


def test_without_a_handler_lines_go_to_the_root(engine: _Kept, caplog: pytest.LogCaptureFixture) -> None:
    logs.join("engine-without-handlers", "debug")
    logging.getLogger("umbp_core.x").debug("hello")
    assert "hello" in caplog.text
    assert engine.lines == []
