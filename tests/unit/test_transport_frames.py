"""Frames come out of the byte stream whole, however it is cut."""

import asyncio
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.transport.frames import FrameConnection, FrameType

DATA = FrameType.DATA


class Recorder:
    """A handler that remembers what it was given."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.target = memoryview(b"")

    def on_made(self) -> None:
        self.events.append(("made",))

    def on_frame(self, kind: FrameType, transfer_id: int, piece: int, body: memoryview) -> None:
        self.events.append((kind, transfer_id, piece, bytes(body)))

    def data_target(self, transfer_id: int, piece: int, nbytes: int) -> memoryview:
        if piece == 99:
            raise ProtocolError("nobody asked")
        self.target = memoryview(bytearray(nbytes))
        return self.target

    def on_data(self, transfer_id: int, piece: int, nbytes: int) -> None:
        self.events.append((DATA, transfer_id, piece, bytes(self.target)))

    def on_lost(self, reason: str) -> None:
        self.events.append(("lost",))


class Wire(asyncio.Transport):
    """Collects what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


def feed(connection: FrameConnection, data: bytes) -> None:
    """What an event loop does with bytes that have arrived."""
    while data:
        buffer = connection.get_buffer(-1)
        assert buffer.nbytes
        count = min(len(data), buffer.nbytes)
        buffer[:count] = data[:count]
        data = data[count:]
        connection.buffer_updated(count)


def connected() -> tuple[FrameConnection, Recorder, Wire]:
    handler, wire = Recorder(), Wire()
    connection = FrameConnection(handler)
    connection.connection_made(wire)
    return connection, handler, wire


frames = st.lists(
    st.tuples(
        st.sampled_from(FrameType),
        st.integers(0, 2**64 - 1),
        st.integers(0, 50),
        st.binary(max_size=300) | st.integers(0, 20_000).map(bytes),
    ),
    max_size=8,
)


@given(frames, st.data())
def test_frames_survive_any_cutting(
    sent: list[tuple[FrameType, int, int, bytes]], data: st.DataObject
) -> None:
    async def check() -> None:
        writer, _, wire = connected()
        for kind, transfer_id, piece, body in sent:
            await writer.send(kind, transfer_id, piece, body)
        stream = bytes(wire.written)
        cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20).map(sorted))
        reader, handler, _ = connected()
        for start, end in pairwise([0, *cuts, len(stream)]):
            feed(reader, stream[start:end])
        assert handler.events[1:] == sent

    asyncio.run(check())


async def test_what_is_no_frame_closes_the_connection() -> None:
    writer, _, wire = connected()
    writer.send_control(FrameType.ACCEPT, 1, 2)
    good = bytes(wire.written)
    for bad in (b"\xff" + good[1:], good[:4] + b"\xff\xff\xff\x7f" + good[8:]):
        reader, handler, theirs = connected()
        feed(reader, good + bad)
        assert handler.events[1:] == [(FrameType.ACCEPT, 1, 2, b"")]
        assert theirs.is_aborted


async def test_data_that_nobody_asked_for_closes_the_connection() -> None:
    writer, _, wire = connected()
    await writer.send(DATA, 1, 99, b"unasked")
    reader, handler, theirs = connected()
    feed(reader, bytes(wire.written))
    assert handler.events[1:] == []
    assert theirs.is_aborted


async def test_a_writer_waits_for_room_and_frames_stay_whole_when_it_gives_up() -> None:
    connection, _, wire = connected()
    connection.pause_writing()
    first = asyncio.create_task(connection.send(DATA, 1, 0, b"first"))
    second = asyncio.create_task(connection.send(DATA, 1, 1, b"second"))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert not wire.written
    connection.resume_writing()
    await second
    reader, handler, _ = connected()
    feed(reader, bytes(wire.written))
    assert handler.events[1:] == [(DATA, 1, 1, b"second")]
