"""Headers and ids of pieces."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.transport.piece import (
    HEADER_BYTES,
    MAX_PIECE_BYTES,
    MAX_PIECES,
    PieceHeader,
    PieceKind,
    TransferIds,
)

u16, u32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)

headers = st.builds(
    PieceHeader,
    transfer_id=st.integers(1, 2**43 - 1).map(lambda n: n << 20),
    piece=st.integers(0, MAX_PIECES - 1),
    kind=st.sampled_from(PieceKind),
    layer=u32,
    block_lo=u32,
    block_hi=u32,
    head_lo=u16,
    head_hi=u16,
    nbytes=st.integers(0, MAX_PIECE_BYTES),
    checksum=st.integers(0, 2**64 - 1),
)

EXAMPLE = PieceHeader(
    transfer_id=5 << 20,
    piece=3,
    kind=PieceKind.KV,
    layer=7,
    block_lo=10,
    block_hi=12,
    head_lo=1,
    head_hi=8,
    nbytes=4096,
    checksum=0x1122334455667788,
)


@given(headers)
def test_a_header_comes_back_as_it_was(header: PieceHeader) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_BYTES
    assert PieceHeader.unpack(packed) == header
    assert PieceHeader.unpack(packed + b"payload") == header


def test_the_bytes_are_fixed() -> None:
    assert EXAMPLE.pack().hex() == (
        "42595043"
        "0100"
        "0100"
        "0000500000000000"
        "03000000"
        "07000000"
        "0a000000"
        "0c000000"
        "0100"
        "0800"
        "0010000000000000"
        "8877665544332211"
        "0000000000000000"
        "55c2fb34"
    )


@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_damaged_header_is_refused(index: int, change: int) -> None:
    packed = bytearray(EXAMPLE.pack())
    packed[index] ^= change
    with pytest.raises(ProtocolError):
        PieceHeader.unpack(packed)


@pytest.mark.parametrize("data", [b"", b"BYPC", bytes(HEADER_BYTES), EXAMPLE.pack()[:-1]])
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        PieceHeader.unpack(data)


@pytest.mark.parametrize(
    "change",
    [
        {"transfer_id": 0},
        {"transfer_id": (5 << 20) + 1},
        {"transfer_id": 1 << 63},
        {"piece": MAX_PIECES},
        {"piece": -1},
        {"head_hi": 1 << 16},
        {"layer": -1},
    ],
)
def test_a_header_that_does_not_fit_is_a_mistake(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"transfer id|not in|fit"):
        dataclasses.replace(EXAMPLE, **change).pack()


def test_tags_of_all_pieces_differ() -> None:
    ids = TransferIds()
    tags = {
        dataclasses.replace(EXAMPLE, transfer_id=transfer_id, piece=piece).tag
        for transfer_id in (ids.next(), ids.next())
        for piece in (0, 1, MAX_PIECES - 1)
    }
    assert len(tags) == 6
    assert min(tags) >= MAX_PIECES


def test_transfer_ids_are_never_given_out_twice() -> None:
    one, other = TransferIds(), TransferIds()
    given_out = [source.next() for source in (one, other) for _ in range(1000)]
    assert len(set(given_out)) == 2000
    assert all(0 < transfer_id < 2**63 and transfer_id % 2**20 == 0 for transfer_id in given_out)
