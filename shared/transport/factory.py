"""Makes the transport, or the channel end, that a setting names."""

import logging
import ssl
from typing import Literal

from shared.errors import TransportError
from shared.transport.base import Transport
from shared.transport.channel import ChannelEnd
from shared.transport.channel_memory import MemoryChannelEnd, MemoryChannelFabric
from shared.transport.channel_tcp import TcpChannelEnd
from shared.transport.memory import MemoryFabric, MemoryTransport
from shared.transport.tcp import TcpTransport

log = logging.getLogger(__name__)

TransportKind = Literal["auto", "ucx", "tcp", "memory"]


def create_transport(
    kind: TransportKind,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    advertise_host: str | None = None,
    verify: bool = True,
    pull: bool = False,
    server_ssl: ssl.SSLContext | None = None,
    client_ssl: ssl.SSLContext | None = None,
    fabric: MemoryFabric | None = None,
) -> Transport:
    """A transport, still to be started.

    ``auto`` is UCX where it works and TCP elsewhere or with TLS; the two understand each other, so
    that one process without ucxx does no harm. With ``pull`` peers on one machine read payloads
    straight from each other's memory. ``memory`` needs its ``fabric``. Finding out whether
    UCX works imports it, which takes about 0.6 s.

    Raises ``TransportError`` if ``ucx`` is asked for and does not work, ``ValueError`` for settings
    that contradict each other.
    """
    if kind == "memory":
        if fabric is None:
            raise ValueError("a memory transport needs the fabric that its peers are on")
        return MemoryTransport(fabric, verify=verify)
    wants_tls = server_ssl is not None or client_ssl is not None
    if kind == "ucx" and wants_tls:
        raise ValueError("UCX has no TLS; use tcp")
    if kind == "ucx" or (kind == "auto" and not wants_tls and _does_ucx_work(host)):
        from shared.transport.ucx import UcxTransport

        return UcxTransport(
            host=host, port=port, advertise_host=advertise_host, verify=verify, pull=pull
        )
    return TcpTransport(
        host=host,
        port=port,
        advertise_host=advertise_host,
        verify=verify,
        pull=pull,
        server_ssl=server_ssl,
        client_ssl=client_ssl,
    )


def create_channel_end(
    kind: TransportKind,
    *,
    host: str = "127.0.0.1",
    fabric: MemoryChannelFabric | None = None,
) -> ChannelEnd:
    """One end of a channel, still to be connected; see ``create_transport``.

    Both ends must be of one kind: with ``auto``, only where all processes have the same packages.
    """
    if kind == "memory":
        if fabric is None:
            raise ValueError("a memory channel needs the fabric that its peer is on")
        return MemoryChannelEnd(fabric)
    if kind == "ucx" or (kind == "auto" and _does_ucx_work(host)):
        from shared.transport.channel_ucx import UcxChannelEnd

        return UcxChannelEnd(host=host)
    return TcpChannelEnd(host=host)


def _does_ucx_work(host: str) -> bool:
    from shared.transport.ucx_library import UcxLibrary

    try:
        UcxLibrary.load().check(host=host)
    except TransportError as error:
        log.warning("tcp is used instead of ucx: %s", error)
        return False
    return True
