"""One contract for the channel face, over memory (threads), TCP and real UCX (processes)."""

import importlib.util
import signal
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from shared.errors import PeerGone, ProtocolError, TransferTimeout
from shared.transport.channel import Channel
from shared.transport.channel_memory import MemoryChannelFabric
from tests.integration.channel_peer import KINDS, ProcessPeer, ThreadPeer, message_of, new_end

LONG_S = 20.0
SOON_S = 0.2
SIZES = (0, 1, 8, 8191, 16_384, 262_143, 262_145, 3_000_001)

HAS_UCX = importlib.util.find_spec("ucxx") is not None


def params(kinds: tuple[str, ...]) -> list[Any]:
    needs_ucx = pytest.mark.skipif(not HAS_UCX, reason="needs ucxx, which is not installed")
    return [pytest.param(kind, marks=[needs_ucx] if kind == "ucx" else []) for kind in kinds]


class World:
    """An end here and one there."""

    def __init__(self, kind: str, stack: ExitStack) -> None:
        fabric = MemoryChannelFabric()
        self.end = new_end(kind, fabric)
        stack.callback(self.end.close)
        peer: Any = ThreadPeer(fabric) if kind == "memory" else ProcessPeer(kind)
        self.peer = stack.enter_context(peer)
        self.peer.ask("address")
        self.peer_address = bytes.fromhex(self.peer.answer()["address"])
        self._stack = stack

    def connect(self, *, is_initiator: bool = True) -> Channel:
        self.peer.ask(
            "connect",
            to=self.end.address.hex(),
            channel_id=7,
            is_initiator=not is_initiator,
            timeout_s=LONG_S,
        )
        channel = self.end.connect(
            self.peer_address, 7, is_initiator=is_initiator, timeout_s=LONG_S
        )
        self._stack.callback(channel.close)
        assert self.peer.answer() == {}
        return channel


@pytest.fixture(params=params(KINDS))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(request.param, stack)


processes_only = pytest.mark.parametrize("world", params(("tcp", "ucx")), indirect=True)


@pytest.mark.parametrize("is_initiator", [True, False])
def test_messages_of_every_size_go_both_ways_in_order(world: World, is_initiator: bool) -> None:
    channel = world.connect(is_initiator=is_initiator)
    expected = [message_of(seed, nbytes) for seed, nbytes in enumerate(SIZES)]

    world.peer.ask("send", sizes=SIZES)
    buffer = bytearray(max(SIZES))
    for message in expected:
        assert channel.recv_into(buffer, timeout_s=LONG_S) == len(message)
        assert buffer[: len(message)] == message
    assert world.peer.answer() == {}

    world.peer.ask("recv", count=len(SIZES))
    for message in expected:
        channel.send(message, timeout_s=LONG_S)
    assert world.peer.answer()["received"] == [
        [len(message), zlib.crc32(message)] for message in expected
    ]


def test_ping_pong(world: World) -> None:
    channel = world.connect()
    world.peer.ask("echo", count=300)
    buffer = bytearray(16_384)
    for seed in range(300):
        message = message_of(seed, 1 + 50 * seed)
        channel.send(message, timeout_s=LONG_S)
        assert channel.recv_into(buffer, timeout_s=LONG_S) == len(message)
        assert buffer[: len(message)] == message
    assert world.peer.answer() == {}


def test_a_receive_that_times_out_loses_nothing(world: World) -> None:
    channel = world.connect()
    buffer = bytearray(100)
    for _ in range(2):
        with pytest.raises(TransferTimeout):
            channel.recv_into(buffer, timeout_s=0.01)
    world.peer.ask("send", sizes=[100])
    assert channel.recv_into(buffer, timeout_s=LONG_S) == 100
    assert buffer == message_of(0, 100)


def test_a_message_that_does_not_fit_is_refused(world: World) -> None:
    channel = world.connect()
    world.peer.ask("send", sizes=[1000])
    with pytest.raises(ProtocolError):
        channel.recv_into(bytearray(999), timeout_s=LONG_S)


def test_closing_is_seen_behind_the_messages(world: World) -> None:
    channel = world.connect()
    world.peer.ask("send", sizes=[10, 20_000])
    assert world.peer.answer() == {}
    world.peer.ask("close")
    assert world.peer.answer() == {}
    buffer = bytearray(20_000)
    assert channel.recv_into(buffer, timeout_s=LONG_S) == 10
    assert channel.recv_into(buffer, timeout_s=LONG_S) == 20_000
    with pytest.raises(PeerGone):
        channel.recv_into(buffer, timeout_s=LONG_S)
    with pytest.raises(PeerGone):
        channel.send(b"anybody?", timeout_s=LONG_S)


def test_a_closed_channel_stays_closed(world: World) -> None:
    channel = world.connect()
    channel.close()
    channel.close()
    with pytest.raises(PeerGone):
        channel.send(b"x", timeout_s=LONG_S)
    with pytest.raises(PeerGone):
        channel.recv_into(bytearray(1), timeout_s=LONG_S)
    world.peer.ask("recv", count=1)
    assert world.peer.answer() == {"error": "PeerGone"}


@processes_only
def test_a_killed_peer_is_gone_at_once(world: World) -> None:
    channel = world.connect()
    world.peer.ask("recv", count=1)
    world.peer.signal(signal.SIGKILL)
    with pytest.raises(PeerGone):
        channel.recv_into(bytearray(10), timeout_s=LONG_S)
    with pytest.raises(PeerGone):
        channel.send(bytes(4 << 20), timeout_s=LONG_S)


@processes_only
def test_a_stopped_peer_times_out(world: World) -> None:
    channel = world.connect()
    world.peer.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout):
        channel.recv_into(bytearray(10), timeout_s=SOON_S)
    with pytest.raises(TransferTimeout):
        channel.send(bytes(64 << 20), timeout_s=SOON_S)
    with pytest.raises(PeerGone):  # a message that went out in part cannot be mended
        channel.send(b"x", timeout_s=SOON_S)
    channel.close()


@pytest.mark.parametrize("is_initiator", [True, False])
def test_nobody_comes(world: World, is_initiator: bool) -> None:
    with pytest.raises(TransferTimeout):
        world.end.connect(world.peer_address, 7, is_initiator=is_initiator, timeout_s=SOON_S)


def test_two_channels_are_not_mixed_up(world: World) -> None:
    world.peer.ask(
        "connect", to=world.end.address.hex(), channel_id=8, is_initiator=True, timeout_s=1.0
    )
    with pytest.raises(TransferTimeout):
        world.end.connect(world.peer_address, 7, is_initiator=False, timeout_s=SOON_S)
    assert "error" in world.peer.answer()


@processes_only
def test_whoever_is_no_peer_is_sent_away(world: World) -> None:
    with pytest.raises(PeerGone):
        new_end("tcp").connect(b"nonsense", 7, is_initiator=True, timeout_s=LONG_S)
    world.peer.signal(signal.SIGKILL)
    with pytest.raises(PeerGone):
        world.end.connect(world.peer_address, 7, is_initiator=True, timeout_s=LONG_S)
