"""The same model without the pool: a plain vLLM in a process of its own that tests ask for the right tokens."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.vllm.engine.local import Ask, Engine, Reply
from tests.vllm.engine.processes import children


class Oracle:
    """Answers requests with an engine that has no connector and no prefix cache.

    The process starts with the first question; it keeps one engine and replaces it when another model or other
    engine arguments are asked for.
    """

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, model: Path, *asks: Ask, **arguments: Any) -> list[Reply]:
        """The replies of a plain engine, one request after the other."""
        if self._pipe is None:
            self._start()
        self._pipe.send((model, asks, arguments))
        if not self._pipe.poll(120):
            raise TimeoutError("the plain engine did not answer within two minutes")
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"the plain engine failed: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(20)
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        context = children()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def _serve(pipe: Connection) -> None:
    engine: Engine | None = None
    current: Any = None
    while True:
        try:
            model, asks, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if current != (model, arguments):
                if engine is not None:
                    engine.close()
                engine = Engine(model, **{"enable_prefix_caching": False, **arguments})
                current = (model, arguments)
            pipe.send(_answer(engine, asks))
        except BaseException as error:  # the asking test must fail, not hang
            pipe.send(f"{type(error).__name__}: {error}")
            raise


def _answer(engine: Engine | None, asks: Sequence[Ask]) -> list[Reply]:
    return [engine.ask_one(ask) for ask in asks] if engine is not None else []
