"""The bulk face over UCX: shared memory within a host, what UCX finds between hosts. Linux only."""

import asyncio
from typing import Any, ClassVar

from shared.errors import PeerGone, ProtocolError
from shared.transport.connected import ConnectedTransport, Link, SendingLink
from shared.transport.frames import FrameConnection, FrameType
from shared.transport.inbox import INLINE_BYTES, Inbox, Offer
from shared.transport.peering import Address, Greeting, Kind
from shared.transport.piece import HEADER_BYTES, PieceHeader
from shared.transport.tcp import GREETING_TIMEOUT_S
from shared.transport.ucx_library import UcxLibrary
from shared.transport.ucx_port import Operation, UcxPort

OFFER_TAG = 1
"""All offers of a link; payloads have their piece's own tag, which is larger than 2**20."""

_NUM_STANDING_RECEIVES = 16
"""Offers that can arrive in one go; more wait in UCX."""

_MAX_OFFER_BYTES = HEADER_BYTES + INLINE_BYTES
