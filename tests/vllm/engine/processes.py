"""Processes of their own for engines that must die, or that change what they touch."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")


def children() -> ForkServerContext:
    """How the tests start processes with an engine: forked from a server that has imported vLLM once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.vllm.engine.local"])
    return context


def in_child(function: Callable[..., T], *arguments: Any, timeout: float = 280.0) -> T:
    """The result of ``function(*arguments)``, called in a process of its own.

    Everything must be picklable.  Raises ``RuntimeError`` when the child died; its traceback is on stderr.
    """
    ours, theirs = children().Pipe(duplex=False)
    child = children().Process(target=_call, args=(theirs, function, arguments))
    child.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise TimeoutError(f"{function.__name__} did not end within {timeout:g} s")
        result: T = ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} died in its process; the traceback is on stderr") from None
    finally:
        child.join(30)
        child.kill()
        child.join()
    return result


@contextlib.contextmanager
def forked_ranks(*, compiling: bool = False) -> Iterator[None]:
    """vLLM forks its processes, as it does for GPUs.

    For the CPU it starts each one anew, which then takes most of a test's time to import vLLM, and to compile the one
    small function that tensor parallelism has.  Where that is not what a test is about, it may be left out.
    """
    import torch

    forked = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as patched:
        patched.enter_context(torch._dynamo.config.patch(disable=not compiling))
        for module in ("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor"):
            patched.enter_context(mock.patch(f"{module}.get_mp_context", return_value=forked))
        yield


def _call(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))
    pipe.close()
