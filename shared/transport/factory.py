"""Makes the transport that a setting names."""

from typing import Literal

from shared.transport.base import Transport
from shared.transport.tcp import TcpTransport


def create_transport(kind: Literal["auto", "ucx", "tcp"], *, host: str) -> Transport:
    return TcpTransport(host=host)
