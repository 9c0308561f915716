"""How much a request's KV is worth keeping, as the request says it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from umbp_core.errors import ConfigError
from umbp_core.offload import DEFAULT_PRIORITY, LEAST_PRIORITY, MOST_PRIORITY

PARAMETER = "umbp.priority"
"""The key in a request's ``kv_transfer_params``."""
MAX_RANGES = 64
_RANGE_KEYS = {"token_start", "token_end", "priority"}


class RequestPriorities:
    """The lowest priority up to each token of one request; higher is worth more.

    ``steps`` are where it gets lower: the first token, and the lowest priority from there on.
    """

    __slots__ = ("_lowest", "_starts")

    def __init__(self, steps: Mapping[int, int]) -> None:
        self._starts = list(steps)
        self._lowest = list(steps.values())

    @classmethod
    def of(cls, request: Any) -> RequestPriorities:
        """What ``request`` says: its ``kv_transfer_params["umbp.priority"]``, else what vLLM's own priority means.

        The parameter is a number from 0 to 100, or a list of ranges of tokens as in TensorRT-LLM, each
        ``{"token_start": 0, "token_end": 1024, "priority": 80}``; a range without ``token_end`` (or ``None``) reaches
        to the end, later ranges win, and tokens in none have the default.
        Raises ``ConfigError`` when it is anything else.
        """
        default = default_priority(request)
        parameters = request.kv_transfer_params
        said = parameters.get(PARAMETER, default) if isinstance(parameters, Mapping) else default
        if isinstance(said, list):
            return cls(_steps(said, default))
        return cls({0: _priority(said)})

    @classmethod
    def unsaid(cls, request: Any) -> RequestPriorities:
        """As :meth:`of` for a request that says nothing itself."""
        return cls({0: default_priority(request)})

    def lowest(self, end: int) -> int:
        """The lowest priority of the first ``end`` tokens; ``end`` is at least 1."""
        return self._lowest[bisect_left(self._starts, end) - 1]


def default_priority(request: Any) -> int:
    """35, less vLLM's ``priority``, of which lower is more urgent; within 0 and 100."""
    return max(LEAST_PRIORITY, min(MOST_PRIORITY, DEFAULT_PRIORITY - int(request.priority)))


def _steps(ranges: list[Any], default: int) -> dict[int, int]:
    if len(ranges) > MAX_RANGES:
        raise ConfigError(f"{PARAMETER} has {len(ranges)} ranges; give {MAX_RANGES} at most")
    checked = [_range(item) for item in ranges]
    starts = sorted({0, *(start for start, _, _ in checked), *(end for _, end, _ in checked if end is not None)})
    own = [_at(checked, token, default) for token in starts]
    return dict(zip(starts, accumulate(own, min), strict=True))


def _at(ranges: list[tuple[int, int | None, int]], token: int, default: int) -> int:
    for start, end, priority in reversed(ranges):
        if start <= token and (end is None or token < end):
            return priority
    return default


def _range(item: Any) -> tuple[int, int | None, int]:
    if not isinstance(item, dict) or not {"token_start", "priority"} <= item.keys() <= _RANGE_KEYS:
        raise ConfigError(f"{PARAMETER} has a range {item!r}; give token_start, token_end and priority")
    start, end = item["token_start"], item.get("token_end")
    if not _is_count(start) or not (end is None or (_is_count(end) and end > start)):
        raise ConfigError(f"{PARAMETER} has a range of tokens {start!r} to {end!r}; give numbers that grow")
    return start, end, _priority(item["priority"])


def _priority(said: Any) -> int:
    if not _is_count(said) or said > MOST_PRIORITY:
        raise ConfigError(f"{PARAMETER} is {said!r}; give a whole number from {LEAST_PRIORITY} to {MOST_PRIORITY}")
    number: int = said
    return number


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
