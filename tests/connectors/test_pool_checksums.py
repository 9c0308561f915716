"""The checksum: key and bytes, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from umbp_connectors.pool.checksums import copy_checksummed, object_checksum, verify_object
from umbp_core.errors import VerificationError


@given(st.binary(max_size=80), st.binary(max_size=300))
def test_it_is_xxh3_128_of_key_and_bytes(key: bytes, data: bytes) -> None:
    assert object_checksum(key, data) == xxh3_128_digest(key + data)


def test_every_kind_of_buffer_gives_the_same() -> None:
    data = bytes(range(256))
    expected = object_checksum(b"key", data)
    array = np.frombuffer(data, dtype=np.uint8)
    for form in (bytearray(data), memoryview(data), array, array.reshape(16, 16), array.view(np.float32)):
        assert object_checksum(b"key", form) == expected
    assert object_checksum(b"key", b"") == xxh3_128_digest(b"key")


def test_memory_in_pieces_is_refused() -> None:
    with pytest.raises((ValueError, BufferError), match="contiguous"):
        object_checksum(b"key", np.zeros((8, 8), dtype=np.uint8)[:, ::2])


@pytest.mark.parametrize("nbytes", [1, 4096, (512 << 10) - 1, 512 << 10, (512 << 10) + 1, 3 << 20])
def test_copying_gives_the_checksum_of_what_arrived(nbytes: int) -> None:
    source = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    target = np.zeros_like(source)
    assert copy_checksummed(b"key", target, source) == object_checksum(b"key", source)
    assert np.array_equal(target, source)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_one_flipped_bit_is_found(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    expected = object_checksum(b"key", data)
    verify_object(b"key", data, expected)
    with pytest.raises(VerificationError, match=b"key".hex()):
        verify_object(b"key", flipped, expected)
    with pytest.raises(VerificationError):
        verify_object(b"kez", data, expected)


@pytest.mark.parametrize("expected", [b"", b"short", bytes(17)])
def test_an_object_without_a_proper_checksum_is_not_served(expected: bytes) -> None:
    with pytest.raises(VerificationError, match="instead of 16"):
        verify_object(b"key", b"data", expected)
