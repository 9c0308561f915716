"""Messages of UMBP's wire, and what becomes of them on a bad day; all from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.master.grpc.harness import message

Spoil = Callable[[random.Random, bytes], bytes]
_WORDS = ["", "n1", "n2", "a", "b", "k1", "été", "-7312890123456789012", "0" * 64]
_NUMBERS = [0, 1, 2, 3, 7, 255, 1 << 31, 1 << 63, (1 << 64) - 1]
_TIERS = [0, 1, 2, 3, 7, -1, (1 << 31) - 1]
_REALS = [0.0, 1.5, -1.0, float("inf"), float("nan")]


def valid(rng: random.Random, name: str) -> bytes:
    """Some message ``name``, with any value in any field."""
    data: bytes = fill(rng, message(name)()).SerializeToString()
    return data


def fill(rng: random.Random, empty: Any, depth: int = 0) -> Any:
    """``empty`` with some of its fields set."""
    for field in empty.DESCRIPTOR.fields:
        if rng.random() < 0.2:
            continue
        target = getattr(empty, field.name)
        if field.message_type is not None and hasattr(target, "add"):
            for _ in range(rng.choice([0, 1, 2])):
                fill(rng, target.add(), depth + 1)
        elif field.message_type is not None:
            fill(rng, target, depth + 1)
        elif hasattr(target, "extend"):
            target.extend(_value(rng, field) for _ in range(rng.choice([0, 1, 3, 20])))
        else:
            setattr(empty, field.name, _value(rng, field))
    return empty


def _value(rng: random.Random, field: Any) -> Any:
    if field.enum_type is not None:
        return rng.choice(_TIERS)
    if field.type == field.TYPE_STRING:
        return rng.choice(_WORDS)
    if field.type == field.TYPE_BYTES:
        return rng.randbytes(rng.randrange(9))
    if field.type == field.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == field.TYPE_DOUBLE:
        return rng.choice(_REALS)
    return rng.choice(_NUMBERS) & (0xFFFFFFFF if field.type == field.TYPE_UINT32 else (1 << 64) - 1)


def nothing(_rng: random.Random, data: bytes) -> bytes:
    return data


def flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 2, 8])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut_off(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start : start + rng.randrange(1, 20)] * rng.randrange(2, 5) + data[start:]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """A length or a number that means far more than there is."""
    at = rng.randrange(len(data) + 1)
    number = rng.choice([b"\xff" * 5 + b"\x0f", b"\xff" * 9 + b"\x01", b"\x80" * 12, b"\xfa\xff\xff\x7f"])
    return data[:at] + number + data[at:]


def nest(rng: random.Random, data: bytes) -> bytes:
    """Groups, which only other versions of protobuf use, deeper than anybody needs."""
    depth = rng.choice([1, 50, 99, 100, 101, 300])
    closed = rng.random() < 0.5
    return data + b"\x7b" * depth + (b"\x7c" * depth if closed else b"")


def noise(rng: random.Random, _data: bytes) -> bytes:
    return rng.randbytes(rng.choice([1, 2, 5, 30, 300]))


SPOILS: tuple[Spoil, ...] = (nothing, flip, flip, flip, cut_off, insert, repeat, overwrite, nest, noise)


def spoilt(rng: random.Random, names: list[str], calls: int) -> list[tuple[str, bytes]]:
    """``calls`` pairs of a call and what is sent to it: its own message or another call's, spoilt."""
    pairs = []
    for _ in range(calls):
        name = rng.choice(names)
        source = name if rng.random() < 0.9 else rng.choice(names)
        pairs.append((name, rng.choice(SPOILS)(rng, valid(rng, f"{source}Request"))))
    return pairs
