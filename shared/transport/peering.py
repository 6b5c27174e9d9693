"""How two transports find each other: the address, and the greeting on a new connection."""

import secrets
import socket
from typing import Literal

import msgspec

from shared.errors import PeerGone, ProtocolError

MAX_ADDRESS_BYTES = 1024
TOKEN_BYTES = 16

Kind = Literal["memory", "tcp", "ucx", "tcp-channel", "ucx-channel", "memory-channel"]


class Address(msgspec.Struct, frozen=True, array_like=True, tag="a1"):
    """Where a transport or a channel end listens, and the secret that lets a peer in.

    ``token`` is new with every start, so that an address of a former process whose port somebody
    else has by now leads nowhere.
    """

    kind: Kind
    host: str
    port: int
    token: bytes

    def encode(self) -> bytes:
        """The address as opaque bytes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes, *kinds: Kind) -> "Address":
        """The address in ``data``; raises ``PeerGone`` if it is none of these kinds."""
        try:
            address = msgspec.msgpack.decode(data, type=cls)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise PeerGone(f"not the address of a {kinds[0]} peer: {error}") from error
        if address.kind not in kinds:
            raise PeerGone(f"the peer speaks {address.kind}, this side {kinds[0]}")
        return address


class Greeting(msgspec.Struct, frozen=True, array_like=True, tag="g1"):
    """The first messages on a connection, in both directions.

    ``token`` is the one of the address that was dialled; ``sender`` the speaking side's own
    address; the rest is filled in as the two sides need it: ``memory_card`` to be read from
    (``pull``), ``can_pull`` the answer to it, ``worker_address`` for UCX; ``channel_id`` and
    ``machine`` (which one this side is on) for channels.
    """

    token: bytes
    sender: bytes
    memory_card: bytes = b""
    can_pull: bool = False
    worker_address: bytes = b""
    channel_id: int = 0
    machine: bytes = b""

    def encode(self) -> bytes:
        """The greeting as bytes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes | memoryview, token: bytes) -> "Greeting":
        """The greeting in ``data``; raises ``ProtocolError`` if it is none or not meant for us."""
        try:
            greeting = msgspec.msgpack.decode(data, type=cls)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise ProtocolError(f"not a greeting: {error}") from error
        if not secrets.compare_digest(greeting.token, token) or not greeting.sender:
            raise ProtocolError("a greeting for somebody else")
        return greeting


def new_token() -> bytes:
    """A secret for one start of one listener."""
    return secrets.token_bytes(TOKEN_BYTES)


def advertised_host(bound_host: str) -> str:
    """The host that peers are told; may ask the resolver when bound to all interfaces."""
    if bound_host in ("", "0.0.0.0", "::"):
        family = socket.AF_INET6 if bound_host == "::" else socket.AF_INET
        found = socket.getaddrinfo(socket.gethostname(), None, family, socket.SOCK_STREAM)
        return str(found[0][4][0])
    return bound_host
