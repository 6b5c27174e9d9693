"""Reading payloads straight out of another process on the same machine (Linux).

This is what UCX does too ("CMA") as long as it need not survive its peers: one copy, by the
receiver alone, at memory speed; the sender need not even get a processor for it. Done with
``process_vm_readv`` directly, a peer that dies is an error code instead of an abort of the reader
(see ``ucx_library``), and as nobody but the reader writes, nothing can land late.

Whether it is allowed (same machine, same user, same PID namespace, no ptrace restriction) is found
out by trying: the sender's *card* names a secret in its memory, and the receiver reads it. It is
read again after each payload: then the bytes came from that very process, whatever its PID means
by now.
"""

import ctypes
import errno
import os
import secrets
import sys
from functools import cache
from typing import Any

import msgspec
import numpy as np

from shared.errors import PeerGone, TransferTimeout

_STEP_BYTES = 4 << 20
"""What is read in one call, about 1 ms; in between the reader looks whether it is still wanted."""

_SECRET_BYTES = 32

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


class _Card(msgspec.Struct, frozen=True, array_like=True):
    pid: int
    address: int
    secret: bytes


class OwnMemory:
    """Lets peers read this process's memory, as far as the system allows it anyway."""

    def __init__(self) -> None:
        self._secret = np.frombuffer(secrets.token_bytes(_SECRET_BYTES), dtype=np.uint8)
        self.card = b""
        """What a peer needs; empty where this cannot be done."""
        if _libc() is not None:
            # Where Yama restricts ptrace to descendants, this process allows it to its user.
            _libc().prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
            self.card = msgspec.msgpack.encode(
                _Card(os.getpid(), address_of(self._secret.data), self._secret.tobytes())
            )


class PeerMemory:
    """The memory of a peer process, for reading."""

    def __init__(self, card: _Card) -> None:
        self._card = card

    @classmethod
    def open(cls, card: bytes) -> "PeerMemory | None":
        """The memory that a card stands for, or ``None`` if it cannot be read from here."""
        if not card or _libc() is None:
            return None
        try:
            memory = cls(msgspec.msgpack.decode(card, type=_Card))
            memory.read(memory._card.address, memoryview(bytearray(1)), Pull(1))
        except (msgspec.DecodeError, OSError, PeerGone):
            return None
        return memory

    def read(self, address: int, buffer: memoryview, pull: "Pull") -> None:
        """Fill ``buffer`` from the peer's memory at ``address``; for any thread.

        Raises ``PeerGone`` if the peer is not there any more, ``TransferTimeout`` when ``pull`` is
        stopped, ``OSError`` if this memory cannot be read in this way.
        """
        start = address_of(buffer)
        found = ctypes.create_string_buffer(_SECRET_BYTES)
        secret_here = _IoVec(ctypes.addressof(found), _SECRET_BYTES)
        secret_there = _IoVec(self._card.address, _SECRET_BYTES)
        here = (_IoVec * 2)(_IoVec(), secret_here)
        there = (_IoVec * 2)(_IoVec(), secret_there)
        for offset in range(0, buffer.nbytes, _STEP_BYTES):
            pull.check()
            num_bytes = min(_STEP_BYTES, buffer.nbytes - offset)
            here[0].base, here[0].length = start + offset, num_bytes
            there[0].base, there[0].length = address + offset, num_bytes
            # One call, in this order: what is found last proves whose bytes came first.
            self._read(here, there, num_bytes + _SECRET_BYTES)
            if found.raw != self._card.secret:
                raise PeerGone(f"process {self._card.pid} is not the peer any more")
        pull.check()

    def _read(self, here: Any, there: Any, num_bytes: int) -> None:
        result = _libc().process_vm_readv(self._card.pid, here, 2, there, 2, 0)
        if result == num_bytes:
            return
        code = ctypes.get_errno() if result < 0 else errno.EFAULT
        if code == errno.ESRCH:
            raise PeerGone(f"process {self._card.pid} is gone")
        raise OSError(code, f"cannot read from process {self._card.pid}: {os.strerror(code)}")


class Pull:
    """A read that can be told to stop; the reason is what its reader raises."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.is_abandoned = False
        self._reason: PeerGone | TransferTimeout | None = None

    def stop(self, reason: PeerGone | TransferTimeout) -> None:
        """Stop at the next step."""
        self._reason = reason

    def check(self) -> None:
        """Raise the reason if it was stopped."""
        if self._reason is not None:
            raise self._reason


def address_of(view: memoryview) -> int:
    """Where a contiguous buffer's memory begins."""
    if not view.readonly and view.nbytes:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def _libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    libc.process_vm_readv.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    return libc
