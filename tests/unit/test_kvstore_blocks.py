import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kvstore.blocks import ArrivingBlock, LayerPiece, StoredBlock, gather_layer
from shared.transport.checksum import ROW_BYTES, checksum


def stored(*layers: bytes) -> StoredBlock:
    arriving = ArrivingBlock([len(data) for data in layers])
    block = None
    for layer, data in enumerate(layers):
        assert block is None
        block = arriving.add(layer, data, num_heads=2, known_checksum=0)
    assert block is not None
    return block


def damaged(block: StoredBlock, layer: int) -> StoredBlock:
    """The same block, one bit of one layer flipped in memory."""
    piece = block.layers[layer]
    data = bytes([piece.data[0] ^ 1]) + piece.data[1:]
    layers = list(block.layers)
    layers[layer] = LayerPiece(data, piece.checksum, piece.num_heads)
    return StoredBlock(tuple(layers), block.shape)


def test_a_block_is_complete_with_its_last_layer_in_whatever_order() -> None:
    arriving = ArrivingBlock([3, 2])
    assert arriving.add(1, b"yz", num_heads=4, known_checksum=7) is None
    block = arriving.add(0, b"abc", num_heads=2, known_checksum=0)
    assert block is not None
    assert [piece.data for piece in block.layers] == [b"abc", b"yz"]
    assert [piece.checksum for piece in block.layers] == [checksum(b"abc"), 7]
    assert block.shape == ((3, 2), (2, 4))


def test_a_block_keeps_a_copy() -> None:
    payload = bytearray(b"abc")
    block = ArrivingBlock([3]).add(0, payload, num_heads=1, known_checksum=0)
    payload[0] = 0
    assert block is not None
    assert block.layers[0].data == b"abc"


@pytest.mark.parametrize(
    ("layer", "payload", "reason"),
    [
        (2, b"abc", "layer 2 of a block of 2"),
        (-1, b"abc", "layer -1"),
        (0, b"abc", "twice"),
        (1, b"abcd", "4 bytes, 3 were announced"),
        (1, b"", "0 bytes, 3 were announced"),
    ],
)
def test_what_was_not_announced_is_refused(layer: int, payload: bytes, reason: str) -> None:
    arriving = ArrivingBlock([3, 3])
    arriving.add(0, b"abc", num_heads=1, known_checksum=0)
    with pytest.raises(ValueError, match=reason):
        arriving.add(layer, payload, num_heads=1, known_checksum=0)


@given(
    piece_bytes=st.sampled_from([1, 7, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 8, 4 * ROW_BYTES]),
    num_blocks=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_gathered_layer_is_the_blocks_one_after_the_other(
    piece_bytes: int, num_blocks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    datas = [rng.bytes(piece_bytes) for _ in range(num_blocks)]
    gathered = gather_layer([stored(b"other", data) for data in datas], 1)
    assert gathered.data == b"".join(datas)
    assert gathered.first_bad is None
    assert gathered.checksum in (None, checksum(b"".join(datas)))
    assert (gathered.checksum is None) == (piece_bytes % ROW_BYTES != 0)


@pytest.mark.parametrize("piece_bytes", [100, 2 * ROW_BYTES])
def test_a_changed_bit_is_found_with_its_block(piece_bytes: int) -> None:
    blocks = [stored(bytes([n]) * piece_bytes) for n in range(4)]
    blocks[2] = damaged(blocks[2], 0)
    blocks[3] = damaged(blocks[3], 0)
    assert gather_layer(blocks, 0).first_bad == 2
