"""One contract for the bulk face, over memory, TCP (pulled and streamed) and real UCX."""

import asyncio
import importlib.util
import os
import random
import ssl
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ChecksumMismatch, PeerGone, ProtocolError, TransferTimeout
from shared.transport.base import PieceKind, TransferIds, Transport
from shared.transport.checksum import checksum
from shared.transport.factory import create_transport
from shared.transport.frames import FrameConnection, FrameType
from shared.transport.links import MEMORY_ADDRESS
from shared.transport.memory import MemoryFabric
from shared.transport.peering import Address, Greeting
from shared.transport.pull import OwnMemory
from shared.transport.tcp import TcpTransport
from tests.integration.transport_peer import (
    CONNECTED_KINDS,
    KINDS,
    LocalPeer,
    RemotePeer,
    header_of,
    new_transport,
    payload_of,
)

SOON_S = 0.3
LONG_S = 20.0
BIG = 1 << 20
"""Never sent along with the offer: waits for the receiver. Summed on the loop, so that offers go
out in the order of the calls."""

SIZES = (0, 1, 511, 513, 16 << 10, (16 << 10) + 1, 100_003, 1 << 20, 5_000_001, 64 << 20)

HAS_UCX = importlib.util.find_spec("ucxx") is not None


class World:
    """A transport in this process, and peers to talk to."""

    def __init__(self, kind: str, stack: AsyncExitStack) -> None:
        self.kind = kind
        self.ids = TransferIds()
        self._stack = stack
        self._fabric = MemoryFabric()

    async def here(self, **options: Any) -> Transport:
        transport = new_transport(self.kind, self._fabric, **options)
        await transport.start()
        self._stack.push_async_callback(transport.close)
        return transport

    async def peer(self, **options: Any) -> Any:
        peer = (
            LocalPeer(self._fabric) if self.kind == "memory" else RemotePeer(self.kind, **options)
        )
        return await self._stack.enter_async_context(peer)


@pytest.fixture(
    params=[
        pytest.param(
            kind,
            marks=pytest.mark.skipif(
                kind == "ucx" and not HAS_UCX, reason="needs ucxx, which is not installed"
            ),
        )
        for kind in KINDS
    ]
)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(request.param, stack)


connected_only = pytest.mark.parametrize(
    "world",
    [
        pytest.param(
            kind,
            marks=pytest.mark.skipif(
                kind == "ucx" and not HAS_UCX, reason="needs ucxx, which is not installed"
            ),
        )
        for kind in CONNECTED_KINDS
    ],
    indirect=True,
)


def start(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(coroutine)


async def eventually(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not is_so():  # noqa: ASYNC110 there is no event for what is asked
            await asyncio.sleep(0.01)


async def test_pieces_of_every_size_arrive_as_they_were_sent(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    inward, outward = world.ids.next(), world.ids.next()
    for piece, nbytes in enumerate(SIZES):
        sending = start(
            peer.call("send", to=here.address.hex(), transfer_id=inward, piece=piece, nbytes=nbytes)
        )
        received = await here.receive(inward, piece, timeout_s=LONG_S)
        assert await sending == {}
        expected = payload_of(piece, nbytes)
        assert bytes(received.payload) == expected
        assert received.header == header_of(inward, piece).sealed(nbytes, received.header.checksum)

        receiving = start(peer.call("receive", transfer_id=outward, piece=piece))
        await here.send(peer.address, header_of(outward, piece), expected, timeout_s=LONG_S)
        assert await receiving == {"nbytes": nbytes, "crc": zlib.crc32(expected)}
    assert here.stats.num_pieces_sent == here.stats.num_pieces_received == len(SIZES)
    assert here.stats.num_bytes_sent == here.stats.num_bytes_received == sum(SIZES)


async def test_many_transfers_at_once_received_in_any_order(world: World) -> None:
    here, one, two = await world.here(), await world.peer(), await world.peer()
    transfers = [world.ids.next() for _ in range(6)]
    pieces = [(transfer_id, piece) for transfer_id in transfers for piece in range(12)]
    sizes = {key: random.Random(key[1]).choice((0, 900, 40_000, 700_000)) for key in pieces}
    sendings = [
        start(
            (one if transfer_id % 3 else two).call(
                "send",
                to=here.address.hex(),
                transfer_id=transfer_id,
                piece=piece,
                nbytes=sizes[transfer_id, piece],
            )
        )
        for transfer_id, piece in pieces
    ]
    random.Random(1).shuffle(pieces)
    received = await asyncio.gather(
        *(here.receive(transfer_id, piece, timeout_s=LONG_S) for transfer_id, piece in pieces)
    )
    for key, piece_received in zip(pieces, received, strict=True):
        assert bytes(piece_received.payload) == payload_of(key[1], sizes[key])
    assert await asyncio.gather(*sendings) == [{}] * len(pieces)


async def test_a_received_payload_stays_as_it_is_while_others_arrive(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    transfer_id = world.ids.next()
    sending = start(
        peer.call("send", to=here.address.hex(), transfer_id=transfer_id, nbytes=1 << 20, count=6)
    )
    kept = []
    for piece in range(6):
        payload = (await here.receive(transfer_id, piece, timeout_s=LONG_S)).payload
        if piece % 2 == 0:
            kept.append((piece, payload[100:]))
        del payload
    for piece, part in kept:
        assert bytes(part) == payload_of(piece, 1 << 20)[100:]
    assert await sending == {}


async def test_into_takes_the_payload_and_refuses_what_does_not_fit(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    for nbytes in (1000, 300_000):
        fitting, too_large = world.ids.next(), world.ids.next()
        target = bytearray(nbytes + 50)
        for transfer_id in (fitting, too_large):
            start(peer.call("send", to=here.address.hex(), transfer_id=transfer_id, nbytes=nbytes))
        received = await here.receive(fitting, 0, timeout_s=LONG_S, into=target)
        assert received.payload.obj is target
        assert target[:nbytes] == payload_of(0, nbytes)
        with pytest.raises(ProtocolError):
            await here.receive(too_large, 0, timeout_s=LONG_S, into=bytearray(nbytes - 1))


async def test_damaged_bytes_are_found_out(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    for nbytes in (700, 700_000, 9_000_000):
        transfer_id = world.ids.next()
        start(
            peer.call(
                "send",
                to=here.address.hex(),
                transfer_id=transfer_id,
                nbytes=nbytes,
                checksum=12345,
            )
        )
        with pytest.raises(ChecksumMismatch):
            await here.receive(transfer_id, 0, timeout_s=LONG_S)
    assert here.stats.num_checksum_mismatches == 3


async def test_without_verifying_nothing_is_summed(world: World) -> None:
    here, peer = await world.here(verify=False), await world.peer()
    transfer_id = world.ids.next()
    start(peer.call("send", to=here.address.hex(), transfer_id=transfer_id, checksum=12345))
    received = await here.receive(transfer_id, 0, timeout_s=LONG_S)
    assert bytes(received.payload) == payload_of(0, 100_000)
    receiving = start(peer.call("receive", transfer_id=transfer_id))
    await here.send(peer.address, header_of(transfer_id, 0), b"unsummed", timeout_s=LONG_S)
    assert (await receiving)["error"] == "ChecksumMismatch"


@pytest.mark.parametrize("nbytes", [10, BIG])
async def test_a_receive_that_times_out_ends_its_transfer(world: World, nbytes: int) -> None:
    here, peer = await world.here(), await world.peer()
    transfer_id, other = world.ids.next(), world.ids.next()
    with pytest.raises(TransferTimeout):
        await here.receive(transfer_id, 0, timeout_s=0.05)
    assert here.stats.num_receive_timeouts == 1
    # What comes now is taken and thrown away, and does not get into the way of others.
    late = peer.call("send", to=here.address.hex(), transfer_id=transfer_id, nbytes=nbytes)
    assert await late == {}
    start(peer.call("send", to=here.address.hex(), transfer_id=other))
    await here.receive(other, 0, timeout_s=LONG_S)
    with pytest.raises(TransferTimeout):
        await here.receive(transfer_id, 0, timeout_s=LONG_S)


async def test_a_send_that_nobody_asks_for_times_out(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    transfer_id, other = world.ids.next(), world.ids.next()
    with pytest.raises(TransferTimeout):
        await here.send(peer.address, header_of(transfer_id, 0), bytes(BIG), timeout_s=SOON_S)
    assert here.stats.num_send_timeouts == 1
    # The receiver is told; it does not wait for its own deadline.
    receiving = await peer.call("receive", transfer_id=transfer_id, timeout_s=LONG_S)
    assert receiving["error"] == "TransferTimeout"
    receiving = start(peer.call("receive", transfer_id=other))
    await here.send(peer.address, header_of(other, 0), bytes(BIG), timeout_s=LONG_S)
    assert (await receiving)["nbytes"] == BIG


async def test_a_discarded_transfer_is_swallowed(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    unwanted, wanted = world.ids.next(), world.ids.next()
    waiting = start(here.receive(unwanted, 5, timeout_s=LONG_S))
    sending = start(
        peer.call("send", to=here.address.hex(), transfer_id=unwanted, nbytes=BIG, count=3)
    )
    start(peer.call("send", to=here.address.hex(), transfer_id=wanted))
    await here.receive(wanted, 0, timeout_s=LONG_S)
    here.discard(unwanted)
    assert await sending == {}
    with pytest.raises(TransferTimeout):
        await waiting


async def test_a_cancelled_receive_leaves_nothing_behind(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    transfer_id = world.ids.next()
    waiting = start(here.receive(transfer_id, 0, timeout_s=LONG_S))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await peer.call("send", to=here.address.hex(), transfer_id=transfer_id) == {}
    await eventually(lambda: here.num_quarantined == 0)


async def test_two_receives_of_one_piece_are_a_mistake(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    transfer_id = world.ids.next()
    first = start(here.receive(transfer_id, 0, timeout_s=LONG_S))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="already"):
        await here.receive(transfer_id, 0, timeout_s=LONG_S)
    assert await peer.call("send", to=here.address.hex(), transfer_id=transfer_id) == {}
    await first


async def test_a_killed_peer_is_gone_and_nobody_else_notices(world: World) -> None:
    here, victim, witness = await world.here(), await world.peer(), await world.peer()
    ids = world.ids
    # In full swing: a stream of pieces from the victim, and one to it that it will never take.
    streamed, offered, marked, unasked = ids.next(), ids.next(), ids.next(), ids.next()
    start(
        victim.call(
            "send", to=here.address.hex(), transfer_id=streamed, nbytes=3 << 20, count=100_000
        )
    )
    start(victim.call("send", to=here.address.hex(), transfer_id=offered, nbytes=BIG))
    await here.receive(streamed, 0, timeout_s=LONG_S)
    start(victim.call("send", to=here.address.hex(), transfer_id=marked, nbytes=10))
    await here.receive(marked, 0, timeout_s=LONG_S)
    sending = start(here.send(victim.address, header_of(unasked, 0), bytes(BIG), timeout_s=LONG_S))
    flowing = start(_receive_until_it_fails(here, streamed))
    witnessing = start(_exchange(here, witness, ids, 20))
    await asyncio.sleep(0.02)
    await victim.kill()
    with pytest.raises(PeerGone):
        await sending
    assert isinstance(await flowing, PeerGone)
    with pytest.raises(PeerGone):  # it had offered this piece and died with it
        await here.receive(offered, 0, timeout_s=LONG_S)
    await witnessing
    with pytest.raises(PeerGone):
        await here.send(victim.address, header_of(ids.next(), 0), bytes(BIG), timeout_s=LONG_S)
    await _exchange(here, witness, ids, 3)
    assert here.num_quarantined == 0


async def test_a_stopped_peer_costs_only_its_own_transfers(world: World) -> None:
    here, victim, witness = await world.here(), await world.peer(), await world.peer()
    ids = world.ids
    await _exchange(here, victim, ids, 1)
    victim.stop()
    sendings = [
        start(here.send(victim.address, header_of(ids.next(), 0), bytes(BIG), timeout_s=SOON_S))
        for _ in range(8)
    ]
    await _exchange(here, witness, ids, 10)
    results = await asyncio.gather(*sendings, return_exceptions=True)
    assert [type(result) for result in results] == [TransferTimeout] * 8
    await here.forget_peer(victim.address)
    assert here.num_quarantined == here.quarantined_bytes == 0
    await _exchange(here, witness, ids, 3)


async def test_a_stopped_peer_that_was_never_met_times_out(world: World) -> None:
    here, victim = await world.here(), await world.peer()
    victim.stop()
    with pytest.raises(TransferTimeout):
        await here.send(
            victim.address, header_of(world.ids.next(), 0), bytes(BIG), timeout_s=SOON_S
        )


@connected_only
async def test_late_bytes_land_in_quarantine(world: World) -> None:
    if world.kind == "tcp-pull":
        pytest.skip("nobody but the receiver writes: there are no late bytes")
    here, victim, witness = await world.here(), await world.peer(), await world.peer()
    transfer_id, marked = world.ids.next(), world.ids.next()
    sending = start(victim.call("send", to=here.address.hex(), transfer_id=transfer_id, nbytes=BIG))
    start(victim.call("send", to=here.address.hex(), transfer_id=marked, nbytes=10))
    await here.receive(marked, 0, timeout_s=LONG_S)  # now the other piece is on offer too
    victim.stop()
    target = bytearray(BIG)
    with pytest.raises(TransferTimeout):
        await here.receive(transfer_id, 0, timeout_s=SOON_S, into=target)
    assert here.num_quarantined == 1
    assert here.quarantined_bytes == BIG
    await _exchange(here, witness, world.ids, 5)
    victim.go_on()
    await sending
    await eventually(lambda: here.num_quarantined == 0)
    assert here.quarantined_bytes == 0


@connected_only
async def test_forgetting_a_peer_ends_the_quarantine(world: World) -> None:
    if world.kind == "tcp-pull":
        pytest.skip("nobody but the receiver writes: there are no late bytes")
    here, victim = await world.here(), await world.peer()
    transfer_id, marked = world.ids.next(), world.ids.next()
    start(victim.call("send", to=here.address.hex(), transfer_id=transfer_id, nbytes=BIG))
    start(victim.call("send", to=here.address.hex(), transfer_id=marked, nbytes=10))
    await here.receive(marked, 0, timeout_s=LONG_S)
    victim.stop()
    with pytest.raises(TransferTimeout):
        await here.receive(transfer_id, 0, timeout_s=SOON_S)
    assert here.num_quarantined == 1
    await here.forget_peer(victim.address)
    assert here.num_quarantined == 0
    victim.go_on()
    await _exchange(here, victim, world.ids, 2)


async def test_a_pulled_payload_needs_no_help_from_its_sender() -> None:
    async with AsyncExitStack() as stack:
        world = World("tcp-pull", stack)
        here, victim = await world.here(), await world.peer()
        transfer_id, marked = world.ids.next(), world.ids.next()
        start(victim.call("send", to=here.address.hex(), transfer_id=transfer_id, nbytes=BIG))
        start(victim.call("send", to=here.address.hex(), transfer_id=marked, nbytes=10))
        await here.receive(marked, 0, timeout_s=LONG_S)
        victim.stop()
        received = await here.receive(transfer_id, 0, timeout_s=LONG_S)
        assert bytes(received.payload) == payload_of(0, BIG)


async def test_closing_ends_what_is_in_flight_on_both_sides(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    inward, outward, never = world.ids.next(), world.ids.next(), world.ids.next()
    await _exchange(here, peer, world.ids, 1)
    receiving = start(here.receive(never, 0, timeout_s=LONG_S))
    sending = start(here.send(peer.address, header_of(outward, 0), bytes(BIG), timeout_s=LONG_S))
    theirs = start(peer.call("send", to=here.address.hex(), transfer_id=inward, nbytes=BIG))
    await asyncio.sleep(0.05)
    await here.close()
    await here.close()
    with pytest.raises(PeerGone):
        await receiving
    with pytest.raises(PeerGone):
        await sending
    assert (await theirs)["error"] == "PeerGone"
    with pytest.raises(PeerGone):
        await here.send(peer.address, header_of(outward, 1), b"", timeout_s=LONG_S)
    with pytest.raises(PeerGone):
        await here.receive(inward, 1, timeout_s=LONG_S)
    again = await world.here()
    assert again.address != here.address
    await _exchange(again, peer, world.ids, 2)


async def test_small_pieces_survive_their_sender(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    transfer_id = world.ids.next()
    sent = await peer.call(
        "send", to=here.address.hex(), transfer_id=transfer_id, nbytes=500, count=5
    )
    assert sent == {}
    await peer.call("close")
    for piece in range(5):
        received = await here.receive(transfer_id, piece, timeout_s=LONG_S)
        assert bytes(received.payload) == payload_of(piece, 500)


@connected_only
async def test_a_peer_that_floods_loses_its_link_and_nobody_else_does(world: World) -> None:
    here = await world.here(max_unclaimed_bytes=100_000)
    flooder, witness = await world.peer(), await world.peer()
    flood, unasked = world.ids.next(), world.ids.next()
    flooding = start(
        flooder.call("send", to=here.address.hex(), transfer_id=flood, nbytes=1000, count=5000)
    )
    pending = await flooder.call("send", to=here.address.hex(), transfer_id=unasked, nbytes=BIG)
    assert pending["error"] == "PeerGone"
    await _exchange(here, witness, world.ids, 2)
    await flooding


async def test_what_is_no_address_and_no_piece_is_refused(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    transfer_id = world.ids.next()
    assert len(here.address) <= 1024
    with pytest.raises(PeerGone):
        await here.send(b"nonsense", header_of(transfer_id, 0), timeout_s=LONG_S)
    with pytest.raises(ValueError, match="no transfer id"):
        await here.send(peer.address, header_of(12345, 0), timeout_s=LONG_S)
    with pytest.raises(ValueError, match="C-contiguous"):
        await here.send(
            peer.address, header_of(transfer_id, 0), memoryview(b"abcd")[::2], timeout_s=LONG_S
        )
    with pytest.raises(ValueError, match="not in"):
        await here.receive(transfer_id, 1 << 20, timeout_s=LONG_S)


@connected_only
async def test_whoever_does_not_know_the_secret_stays_outside(world: World) -> None:
    here, peer = await world.here(), await world.peer()
    stranger = peer.address[:-1] + bytes([peer.address[-1] ^ 1])
    with pytest.raises(PeerGone):
        await here.send(stranger, header_of(world.ids.next(), 0), b"x", timeout_s=LONG_S)
    await _exchange(here, peer, world.ids, 1)


class ByHand:
    """The sending end of a link, frame by frame."""

    def __init__(self) -> None:
        self.connection = FrameConnection(self)
        self.frames: asyncio.Queue[tuple[FrameType, bytes]] = asyncio.Queue()

    def on_made(self) -> None:
        pass

    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        self.frames.put_nowait((kind, bytes(body)))

    def data_target(self, transfer_id: int, piece: int, nbytes: int) -> memoryview:
        raise AssertionError("a sender gets no data")

    def on_data(self, transfer_id: int, piece: int, nbytes: int) -> None:
        raise AssertionError("a sender gets no data")

    def on_lost(self, reason: str) -> None:
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pulling is done on Linux only")
async def test_memory_that_cannot_be_pulled_is_streamed() -> None:
    async with AsyncExitStack() as stack:
        world = World("tcp-pull", stack)
        here = await world.here()
        address = Address.decode(here.address, "tcp")
        memory, sender = OwnMemory(), ByHand()
        await asyncio.get_running_loop().create_connection(
            lambda: sender.connection, address.host, address.port
        )
        greeting = Greeting(token=address.token, sender=b"by hand", memory_card=memory.card)
        sender.connection.send_control(FrameType.GREETING, body=greeting.encode())
        kind, body = await sender.frames.get()
        assert kind is FrameType.GREETING
        assert Greeting.decode(body, address.token).can_pull
        for nbytes in (BIG, 5 * BIG):
            transfer_id, payload = world.ids.next(), payload_of(1, nbytes)
            header = header_of(transfer_id, 0).sealed(nbytes, checksum(payload))
            nowhere = MEMORY_ADDRESS.pack(8)
            sender.connection.send_control(FrameType.OFFER, transfer_id, 0, header.pack() + nowhere)
            receiving = start(here.receive(transfer_id, 0, timeout_s=LONG_S))
            assert await sender.frames.get() == (FrameType.ACCEPT, b"")
            await sender.connection.send(FrameType.DATA, transfer_id, 0, payload)
            assert bytes((await receiving).payload) == payload
        sender.connection.close("done")


@pytest.mark.skipif(not HAS_UCX, reason="needs ucxx, which is not installed")
async def test_ucx_and_tcp_understand_each_other() -> None:
    async with AsyncExitStack() as stack:
        here = create_transport("ucx")
        await here.start()
        stack.push_async_callback(here.close)
        for kind in ("tcp-pull", "tcp-stream"):
            peer = await stack.enter_async_context(RemotePeer(kind))
            await _exchange(here, peer, TransferIds(), 2)


@pytest.mark.skipif(not HAS_UCX, reason="needs ucxx, which is not installed")
async def test_ucx_transports_come_and_go_in_one_process() -> None:
    for _ in range(2):
        async with AsyncExitStack() as stack:
            world = World("ucx", stack)
            one, two = await world.here(), await world.here()
            transfer_id = world.ids.next()
            receiving = start(two.receive(transfer_id, 0, timeout_s=LONG_S))
            await one.send(
                two.address, header_of(transfer_id, 0), payload_of(1, BIG), timeout_s=LONG_S
            )
            assert bytes((await receiving).payload) == payload_of(1, BIG)


async def test_tcp_with_tls(tmp_path: Path) -> None:
    server_ssl, client_ssl = _tls(tmp_path)
    async with AsyncExitStack() as stack:
        one, two = (TcpTransport(server_ssl=server_ssl, client_ssl=client_ssl) for _ in "ab")
        plain = TcpTransport()
        for transport in (one, two, plain):
            await transport.start()
            stack.push_async_callback(transport.close)
        ids = TransferIds()
        for nbytes in (0, 1000, BIG):
            transfer_id = ids.next()
            receiving = start(two.receive(transfer_id, 0, timeout_s=LONG_S))
            await one.send(
                two.address,
                header_of(transfer_id, 0),
                payload_of(nbytes, nbytes),
                timeout_s=LONG_S,
            )
            assert bytes((await receiving).payload) == payload_of(nbytes, nbytes)
        with pytest.raises((PeerGone, TransferTimeout)):
            await plain.send(two.address, header_of(ids.next(), 0), b"x", timeout_s=1.0)
        with pytest.raises((PeerGone, TransferTimeout)):
            await one.send(plain.address, header_of(ids.next(), 0), b"x", timeout_s=1.0)


def _tls(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 "
        f"-subj /CN=banyan -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}",
        shell=True,
        check=True,
        capture_output=True,
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


async def _exchange(here: Transport, peer: Any, ids: TransferIds, count: int) -> None:
    for _ in range(count):
        inward, outward = ids.next(), ids.next()
        sending = start(
            peer.call("send", to=here.address.hex(), transfer_id=inward, nbytes=400_000)
        )
        received = await here.receive(inward, 0, timeout_s=LONG_S)
        assert bytes(received.payload) == payload_of(0, 400_000)
        assert await sending == {}
        receiving = start(peer.call("receive", transfer_id=outward))
        await here.send(
            peer.address,
            header_of(outward, 0, PieceKind.WEIGHTS),
            os.urandom(90_000),
            timeout_s=LONG_S,
        )
        assert (await receiving)["nbytes"] == 90_000


async def _receive_until_it_fails(here: Transport, transfer_id: int) -> Exception:
    piece = 1
    while True:
        try:
            await here.receive(transfer_id, piece, timeout_s=LONG_S)
        except (PeerGone, TransferTimeout) as error:
            return error
        piece += 1
