"""Reading memory by its card; here a process reads its own."""

import ctypes
import sys

import msgspec
import pytest

from shared.errors import TransferTimeout
from shared.transport.pull import OwnMemory, PeerMemory, Pull, address_of

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pulling is done on Linux only"
)


def test_a_card_opens_the_memory_of_its_process() -> None:
    own = OwnMemory()
    memory = PeerMemory.open(own.card)
    assert memory is not None
    for source in (b"read-only bytes" * 1000, bytearray(range(256)) * 40_000):
        target = memoryview(bytearray(len(source)))
        memory.read(address_of(memoryview(source)), target, Pull(target.nbytes))
        assert bytes(target) == source


@pytest.mark.parametrize("card", [b"", b"nonsense", msgspec.msgpack.encode([1, 2])])
def test_what_is_no_card_opens_nothing(card: bytes) -> None:
    assert PeerMemory.open(card) is None


def test_a_card_of_another_process_opens_nothing() -> None:
    own = OwnMemory()
    pid, address, secret = msgspec.msgpack.decode(own.card)
    forged = [pid, address, secret[:-1] + bytes([secret[-1] ^ 1])]
    assert PeerMemory.open(msgspec.msgpack.encode(forged)) is None
    assert PeerMemory.open(msgspec.msgpack.encode([pid, 8, secret])) is None
    assert PeerMemory.open(msgspec.msgpack.encode([2**22 - 1, address, secret])) is None


def test_memory_that_is_not_there_is_an_os_error() -> None:
    own = OwnMemory()
    memory = PeerMemory.open(own.card)
    assert memory is not None
    with pytest.raises(OSError, match="cannot read"):
        memory.read(8, memoryview(bytearray(100)), Pull(100))


def test_a_stopped_pull_raises_its_reason() -> None:
    own = OwnMemory()
    memory = PeerMemory.open(own.card)
    assert memory is not None
    pull = Pull(4)
    pull.stop(TransferTimeout("given up"))
    source = memoryview(b"data")
    with pytest.raises(TransferTimeout, match="given up"):
        memory.read(address_of(source), memoryview(bytearray(4)), pull)


def test_addresses_are_those_of_the_memory() -> None:
    for buffer in (b"abc", bytearray(b"abc")):
        assert ctypes.string_at(address_of(memoryview(buffer)[1:]), 2) == b"bc"
