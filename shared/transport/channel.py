"""The channel face of the data plane: messages between two engine threads, synchronous.

An engine thread drives its channels itself: a hop through two event loops would cost more than a
layer. So nothing here knows an event loop, and nothing but the calling thread does the work.
"""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from shared.transport.piece import Buffer


class Channel(ABC):
    """An established channel: messages in order, both ways, each with its own length.

    Belongs to one thread at a time. ``send`` may return before the peer has received; how much
    may be on its way is bounded, so two sides that only send to each other end with a timeout.
    """

    @abstractmethod
    def send(self, buffer: Buffer, *, timeout_s: float) -> None:
        """Send one message, a C-contiguous buffer; its memory is free when this returns.

        Raises ``PeerGone`` if the other side is gone or has closed, ``TransferTimeout`` at the
        deadline; after either the channel is good for nothing but ``close``, and the memory of a
        message that timed out must not be changed before that.
        """

    @abstractmethod
    def recv_into(self, buffer: Buffer, *, timeout_s: float) -> int:
        """Receive the next message into ``buffer`` and return its size in bytes.

        Raises ``TransferTimeout`` if nothing has come by the deadline; the channel is as good as
        before then. Raises ``PeerGone`` if the other side is gone or has closed and all that it
        sent has been received, ``ProtocolError`` if the message is larger than ``buffer``, and
        ``TransferTimeout`` as ``send`` does if a message has only come in part.
        """

    @abstractmethod
    def close(self) -> None:
        """Close both directions; messages that the peer has not received yet may be lost."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ChannelEnd(ABC):
    """One side of a channel that is still to be established.

    Both sides make an end, exchange ``address`` over the bus, and call ``connect`` with the same
    ``channel_id``; one of them as the initiator. Memory and file descriptors of an end that is
    never connected are given back by ``close``.
    """

    @property
    @abstractmethod
    def address(self) -> bytes:
        """What the other side needs: opaque, at most 1 KiB. It holds a secret, as a transport's."""

    @abstractmethod
    def connect(
        self, peer: bytes, channel_id: int, *, is_initiator: bool, timeout_s: float
    ) -> Channel:
        """Meet the end at address ``peer``; once.

        Returns when both sides are there. Raises ``TransferTimeout`` if the other has not come by
        the deadline, ``PeerGone`` if it cannot be reached; the end is closed then.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop listening. The channel that came of it, if any, is not touched."""
