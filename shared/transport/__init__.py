"""The data plane: tensors between processes.

Bulk face (asynchronous): ``base.Transport``, made by ``factory.create_transport``. Channel face
(synchronous): ``channel.Channel``, made by ``factory.create_channel_end``. Importing this package
loads no implementation.
"""

from shared.transport.base import Transport, TransportStats
from shared.transport.channel import Channel, ChannelEnd
from shared.transport.piece import Piece, PieceHeader, PieceKind, TransferIds

__all__ = [
    "Channel",
    "ChannelEnd",
    "Piece",
    "PieceHeader",
    "PieceKind",
    "TransferIds",
    "Transport",
    "TransportStats",
]
