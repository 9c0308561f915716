"""TEST-ONLY.  SGLang's page hash without a compiler.

SGLang compiles it at its first use, which needs a C++ compiler, ninja and the headers of Python and OpenSSL.  Where one
of them is missing, the same digests are computed here, slowly.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_NARROW = 1 << 32
_logger = logging.getLogger(__name__)


class PythonPageHash:
    """What SGLang's compiled module is to its callers."""

    @staticmethod
    def get_hash(
        raw: array[int], length: int, width: int, bigram: bool, prior: bytes | None, page_size: int | None = None
    ) -> str | list[str]:
        """The digest of all ``length`` units, or with ``page_size`` the chain of digests of their pages."""
        digest = prior or b""
        chain = []
        for start in range(0, length, page_size) if page_size else (0,):
            stop = min(start + (page_size or length), length)
            digest = hashlib.sha256(digest + _encoded(_numbers(raw, start, stop, width, bigram))).digest()
            chain.append(digest.hex())
        return chain if page_size else chain[0]


def compiled_or_python(load: Callable[[], Any]) -> Callable[[], Any]:
    """``load``, SGLang's own, with the class above in the place of its failure."""

    @functools.cache
    def loaded() -> Any:
        try:
            return load()
        except RuntimeError as error:
            _logger.warning("SGLang's page hash cannot be compiled here (%s); using the tests' own", error.__cause__)
            return PythonPageHash

    return loaded


def _numbers(raw: Sequence[int], start: int, stop: int, width: int, bigram: bool) -> list[int]:
    """What the units from ``start`` to ``stop`` consist of; a bigram is a token and the next one."""
    if bigram:
        return list(_pairs(raw[start : stop + 1]))
    return list(raw[start * width : stop * width])


def _pairs(tokens: Sequence[int]) -> Iterator[int]:
    for first, second in itertools.pairwise(tokens):
        yield from (first, second)


def _encoded(numbers: Sequence[int]) -> bytes:
    """Four bytes each, little-endian; eight behind a tag when one of them does not fit."""
    if any(number < 0 or number >= 1 << 63 for number in numbers):
        raise IndexError("token id must be a non-negative int64")
    if all(number < _NARROW for number in numbers):
        return b"".join(number.to_bytes(4, "little") for number in numbers)
    return b"\xff" + b"".join(number.to_bytes(8, "little") for number in numbers)
