"""The bulk face inside one process: for tests, and as the shortest statement of the contract."""

import asyncio

from shared.errors import PeerGone, TransferTimeout
from shared.transport.base import Transport
from shared.transport.inbox import INLINE_BYTES, Inbox, Offer
from shared.transport.peering import Address, new_token
from shared.transport.piece import PieceHeader


class MemoryFabric:
    """The network of the memory transports that were made with it; can break like a real one."""

    def __init__(self) -> None:
        self._peers: dict[bytes, MemoryTransport] = {}
        self._frozen: set[bytes] = set()

    def freeze(self, address: bytes) -> None:
        """From now on this peer neither takes nor gives anything, like a stopped process."""
        self._frozen.add(address)

    async def kill(self, address: bytes) -> None:
        """End this peer without a farewell, like a killed process."""
        self._frozen.discard(address)
        peer = self._peers.get(address)
        if peer is not None:
            await peer.close()

    def is_frozen(self, address: bytes) -> bool:
        """Whether the peer was frozen."""
        return address in self._frozen

    def join(self, transport: "MemoryTransport") -> bytes:
        """A new address for a transport; for transports."""
        address = Address("memory", "", 0, new_token()).encode()
        self._peers[address] = transport
        return address

    def leave(self, address: bytes) -> None:
        """The address leads nowhere from now on; for transports."""
        self._peers.pop(address, None)
        for peer in self._peers.values():
            peer.lose(address, PeerGone("the peer left the memory fabric"))

    def find_or_none(self, address: bytes) -> "MemoryTransport | None":
        """Who is at an address, if anybody; for transports."""
        return self._peers.get(address)

    def find(self, address: bytes) -> "MemoryTransport":
        """Who is at an address; raises ``PeerGone``. For transports."""
        Address.decode(address, "memory")
        peer = self.find_or_none(address)
        if peer is None:
            raise PeerGone("nobody is at this address of the memory fabric")
        return peer


class MemoryTransport(Transport):
    """Hands pieces over within one event loop; payloads are copied, as everywhere."""

    def __init__(self, fabric: MemoryFabric, *, verify: bool = True) -> None:
        super().__init__(verify=verify)
        self.name = "memory"
        self._fabric = fabric
        self._address = b""
        self._sending: set[_MemoryOffer] = set()

    @property
    def address(self) -> bytes:
        """See ``Transport``."""
        if not self._address:
            raise RuntimeError("a transport has no address before it is started")
        return self._address

    @property
    def num_quarantined(self) -> int:
        """Always 0: no byte can be on its way when a receive ends."""
        return 0

    @property
    def quarantined_bytes(self) -> int:
        """Always 0."""
        return 0

    @property
    def inbox(self) -> Inbox:
        """Where peers on the same fabric put their offers."""
        return self._inbox

    async def start(self) -> None:
        """See ``Transport``."""
        self._address = self._fabric.join(self)
        self._is_open = True

    async def close(self) -> None:
        """See ``Transport``."""
        if not self._is_open:
            return
        self._is_open = False
        reason = "the memory transport was closed"
        self._inbox.close(reason)
        for offer in list(self._sending):
            offer.fail(PeerGone(reason))
        self._fabric.leave(self._address)
        self._staging.clear()

    async def forget_peer(self, peer: bytes) -> None:
        """See ``Transport``."""
        reason = PeerGone("the peer was forgotten")
        self.lose(peer, reason)
        other = self._fabric.find_or_none(peer)
        if other is not None:
            other.lose(self.address, reason)

    def lose(self, peer: bytes, reason: PeerGone) -> None:
        """End what is in flight with a peer, on this side; for the fabric."""
        for offer in [offer for offer in self._sending if offer.target == peer]:
            offer.fail(reason)
        self._inbox.lose(peer, reason)

    async def _send(self, peer: bytes, header: PieceHeader, payload: memoryview) -> None:
        receiver = self._fabric.find(peer)
        inline = memoryview(bytes(payload)) if payload.nbytes <= INLINE_BYTES else None
        offer = _MemoryOffer(header, inline, payload, source=self.address, target=peer)
        self._sending.add(offer)
        try:
            if self._fabric.is_frozen(peer):
                await offer.taken
            elif not receiver.inbox.put(offer):
                raise PeerGone("too many pieces there that nobody asked for")
            elif inline is None:
                await offer.taken
        finally:
            self._sending.discard(offer)
            offer.fail(TransferTimeout("the sender gave the piece up"))


class _MemoryOffer(Offer):
    def __init__(
        self,
        header: PieceHeader,
        inline: memoryview | None,
        payload: memoryview,
        *,
        source: bytes,
        target: bytes,
    ) -> None:
        super().__init__(header, inline, source)
        self.target = target
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._payload: memoryview | None = payload
        self._failure: PeerGone | TransferTimeout | None = None

    async def accept(self, buffer: memoryview) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)
        assert self._payload is not None
        buffer[:] = self._payload
        self.refuse()

    def refuse(self) -> None:
        self._payload = None
        if not self.taken.done():
            self.taken.set_result(None)

    def fail(self, error: PeerGone | TransferTimeout) -> None:
        if self._failure is None:
            self._failure = error
        self._payload = None
        if not self.taken.done():
            self.taken.set_exception(error)
            self.taken.exception()
