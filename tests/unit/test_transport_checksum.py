"""What the payload checksum sees, and what it says it does not see."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.transport.checksum import ROW_BYTES, ROW_WORDS, checksum, digest, row_sums

payloads = st.binary(max_size=4 * ROW_BYTES + 17)


def by_hand(payload: bytes) -> int:
    """The definition, one word at a time."""
    padded = payload + bytes(-len(payload) % ROW_BYTES)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    sums = [sum(words[i : i + ROW_WORDS]) % 2**64 for i in range(0, len(words), ROW_WORDS)]
    data = len(payload).to_bytes(8, "little") + b"".join(s.to_bytes(8, "little") for s in sums)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


@given(payloads)
def test_it_is_what_it_is_defined_to_be(payload: bytes) -> None:
    assert checksum(payload) == by_hand(payload)


def test_known_values() -> None:
    assert checksum(b"") == 0x18CC49CA5BEA08CA
    assert checksum(b"banyan") == 0xF549202B2623AEDE
    assert checksum(bytes(range(256)) * 5) == 0xA9C7F2EF61702A33


@given(payloads.filter(len), st.data())
def test_any_changed_byte_is_seen(payload: bytes, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(payload) - 1))
    damaged = bytearray(payload)
    damaged[index] ^= data.draw(st.integers(1, 255))
    assert checksum(damaged) != checksum(payload)


@given(payloads, st.integers(1, 600))
def test_missing_and_added_zeros_are_seen(payload: bytes, count: int) -> None:
    assert checksum(payload + bytes(count)) != checksum(payload)


def test_swapped_rows_are_seen_and_swapped_words_of_a_row_are_not() -> None:
    words = np.arange(4 * ROW_WORDS, dtype=np.uint64)
    rows = words.reshape(4, ROW_WORDS)
    assert checksum(np.ascontiguousarray(rows[[1, 0, 2, 3]])) != checksum(words)
    swapped = words.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert checksum(swapped) == checksum(words)


@given(payloads)
def test_signed_wrapping_sums_give_the_same(payload: bytes) -> None:
    padded = payload + bytes(-len(payload) % ROW_BYTES)
    words = np.frombuffer(padded, dtype="<i8").reshape(-1, ROW_WORDS)
    sums = words.sum(axis=1, dtype="<i8")
    assert np.array_equal(sums.view("<u8"), row_sums(payload))
    assert digest(len(payload), sums.data) == checksum(payload)


def test_any_contiguous_buffer_will_do() -> None:
    array = np.arange(6000, dtype=np.float32).reshape(2, 3000)
    assert checksum(array) == checksum(array.tobytes())
    assert checksum(memoryview(array.tobytes())[1:]) == checksum(array.tobytes()[1:])
    with pytest.raises(ValueError, match="C-contiguous"):
        checksum(array[:, ::2])


def test_zero_is_left_free() -> None:
    assert all(checksum(bytes(n)) != 0 for n in range(0, 3000, 7))
