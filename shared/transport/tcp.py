"""The bulk face over TCP: everywhere, across machines, TLS possible."""

from typing import ClassVar

from shared.transport.connected import ConnectedTransport
from shared.transport.peering import Kind


class TcpTransport(ConnectedTransport):
    """Payloads on the connection, in frames; on one machine they are pulled where that is allowed.

    A payload is sent when the receiver has asked for it, straight into the memory where it is to
    land; so the connection never has to be paused, and no piece waits behind one that nobody wants.
    """

    kind: ClassVar[Kind] = "tcp"
