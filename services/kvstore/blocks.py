"""The bytes of blocks: one piece a layer, each with the checksum it was put with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.transport.checksum import ROW_BYTES, checksum, digest, row_sums
from shared.transport.piece import Buffer, byte_view


@dataclass(frozen=True, slots=True)
class LayerPiece:
    """The KV of one layer of one block; ``checksum`` is that of the bytes as they were put.

    ``num_heads`` is how many KV heads the bytes are of: whoever reads them has to be told.
    """

    data: bytes
    checksum: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A complete block: its layers in order.

    ``shape`` is bytes and heads of each layer; blocks of one shape can be sent as one run.
    """

    layers: tuple[LayerPiece, ...]
    shape: tuple[tuple[int, int], ...]


class ArrivingBlock:
    """A block that is being put, layer by layer in any order."""

    def __init__(self, layer_bytes: Sequence[int]) -> None:
        self._layer_bytes = tuple(layer_bytes)
        self._pieces: dict[int, LayerPiece] = {}

    def add(
        self, layer: int, payload: Buffer, *, num_heads: int, known_checksum: int
    ) -> StoredBlock | None:
        """Copy one layer's bytes; returns the block once it has all of them.

        ``known_checksum`` is one that ``payload`` has just been verified against, or 0: then it is
        summed here. Raises ``ValueError`` for a layer that there is not, that has come before, or
        that is not of the announced size.
        """
        view = byte_view(payload)
        if not 0 <= layer < len(self._layer_bytes):
            raise ValueError(f"layer {layer} of a block of {len(self._layer_bytes)} layers")
        if layer in self._pieces:
            raise ValueError(f"layer {layer} came twice")
        if view.nbytes != self._layer_bytes[layer]:
            raise ValueError(
                f"layer {layer} has {view.nbytes} bytes, {self._layer_bytes[layer]} were announced"
            )
        data = bytes(view)
        self._pieces[layer] = LayerPiece(data, known_checksum or checksum(data), num_heads)
        if len(self._pieces) < len(self._layer_bytes):
            return None
        layers = tuple(self._pieces[index] for index in range(len(self._pieces)))
        return StoredBlock(layers, tuple((len(piece.data), piece.num_heads) for piece in layers))


@dataclass(frozen=True, slots=True)
class GatheredLayer:
    """One layer of a run of blocks, one block after the other, ready to be sent.

    ``checksum`` is that of ``data`` as a whole, ``None`` where it would have to be summed anew.
    ``first_bad`` is the index in the run of the first block whose bytes are no longer those that
    were put, ``None`` if all are: ``data`` with a bad block must not be used.
    """

    data: memoryview
    checksum: int | None
    first_bad: int | None


def gather_layer(blocks: Sequence[StoredBlock], layer: int) -> GatheredLayer:
    """Copy one layer of ``blocks`` together and verify the copy, so that what is sent is verified.

    Reads and writes the bytes once and sums them once, at memory speed: work for a thread. The
    blocks' pieces of ``layer`` are of one size.
    """
    piece_bytes = len(blocks[0].layers[layer].data)
    data = np.empty((len(blocks), piece_bytes), dtype=np.uint8)
    for index, block in enumerate(blocks):
        data[index] = np.frombuffer(block.layers[layer].data, dtype=np.uint8)
    if piece_bytes % ROW_BYTES == 0:
        # Whole rows: the sums of the run are those of its blocks, so one pass serves both.
        sums = row_sums(data).reshape(len(blocks), piece_bytes // ROW_BYTES)
        found = [digest(piece_bytes, sums[index].data) for index in range(len(blocks))]
        whole: int | None = digest(data.nbytes, sums.reshape(-1).data)
    else:
        found = [checksum(data[index]) for index in range(len(blocks))]
        whole = None
    bad = (i for i, block in enumerate(blocks) if block.layers[layer].checksum != found[i])
    return GatheredLayer(byte_view(data), whole, next(bad, None))
