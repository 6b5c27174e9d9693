"""Payloads as UCX messages, beside the link's connection."""

import asyncio

from shared.errors import ProtocolError, TransferTimeout
from shared.transport.frames import FrameConnection, FrameType
from shared.transport.links import Key
from shared.transport.ucx_port import Operation, UcxPort


class UcxSending:
    """Implements ``Sending``: one message a payload, its tag is the piece's own number."""

    def __init__(self, port: UcxPort) -> None:
        self._port = port
        self._stopped: set[Key] = set()

    @property
    def num_quarantined(self) -> int:
        """Payloads given up by their sender that UCX may still read."""
        return self._port.num_abandoned

    @property
    def quarantined_bytes(self) -> int:
        """Their size."""
        return self._port.abandoned_bytes

    async def send(self, key: Key, payload: memoryview) -> bool:
        """See ``Sending``. Once UCX has it, it cannot be withdrawn: the receiver is there for it"""
        await self._port.wait(self._port.post_send(payload, key[0] | key[1]))
        return True

    def stop(self, key: Key) -> None:
        """See ``Sending``; the receiver takes the rest into quarantine."""

    def fail(self, reason: str) -> None:
        """See ``Sending``."""
        self._port.close(reason)


class UcxReceiving:
    """Implements ``Receiving``: the receive is posted before the sender is asked to send."""

    def __init__(self, port: UcxPort, connection: FrameConnection) -> None:
        self._port = port
        self._connection = connection
        self._operations: dict[Key, Operation] = {}

    @property
    def num_quarantined(self) -> int:
        """Buffers that UCX may still fill for nobody."""
        return self._port.num_abandoned

    @property
    def quarantined_bytes(self) -> int:
        """Their size."""
        return self._port.abandoned_bytes

    async def land(self, key: Key, buffer: memoryview) -> None:
        """See ``Receiving``."""
        operation = self._port.post_receive(
            buffer, key[0] | key[1], on_end=lambda: self._operations.pop(key, None)
        )
        self._operations[key] = operation
        self._connection.send_control(FrameType.ACCEPT, *key)
        try:
            await self._port.wait(operation)
        except asyncio.CancelledError:
            self._connection.send_control(FrameType.DONE, *key)
            raise

    def withdraw(self, key: Key) -> None:
        """See ``Receiving``; the peer has not given it to UCX, so nothing can arrive."""
        operation = self._operations.get(key)
        if operation is not None:
            reason = f"the sender gave up piece {key[1]} of transfer {key[0]}"
            self._port.cancel(operation, TransferTimeout(reason))

    def fail(self, reason: str) -> None:
        """See ``Receiving``."""
        self._port.close(reason)

    def data_target(self, key: Key, nbytes: int) -> memoryview:
        """See ``Receiving``."""
        raise ProtocolError("data beside UCX")

    def on_data(self, key: Key, nbytes: int) -> None:
        """See ``Receiving``."""
        raise ProtocolError("data beside UCX")
