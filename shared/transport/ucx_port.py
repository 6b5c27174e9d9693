"""One UCX worker that talks to exactly one peer, driven by the event loop."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from shared.errors import PeerGone, TransportError
from shared.transport.ucx_library import UcxLibrary

_BUDGET_S = 0.001
"""How long one turn may drive UCX before the event loop gets its own."""

_SPIN_S = 20e-6
"""How long to look for the next fragment before going to sleep; waking up costs more."""

_PATIENCE_S = 0.0003
"""How long a sender that waits for room at the receiver looks for it in every turn of the loop.
A receiver that has a core to itself empties its inbox in this time."""

_BACKOFF_S = (0.001, 0.016)
"""How often it looks after that, less often the longer nothing moves: UCX has no event for "there
is room", the receiver may need this very core, and one that is frozen must not cost one."""


class Operation:
    """A message being sent or received. Keeps the buffer until UCX is done with it."""

    __slots__ = ("buffer", "error", "future", "is_abandoned", "on_end", "request")

    def __init__(
        self, request: Any, buffer: memoryview | None, on_end: Callable[[], object] | None
    ) -> None:
        self.request = request
        self.buffer = buffer
        self.on_end = on_end
        self.future: asyncio.Future[None] | None = None
        self.error: TransportError | None = None
        self.is_abandoned = False


class UcxPort:
    """A UCX worker and its one endpoint.

    Every peer gets a port of its own because a UCX worker over shared memory has one inbox for all
    senders, and a sender that dies while it writes leaves the inbox stuck (see ``ucx_library``).

    ``on_failed`` is called with a reason when UCX reports that the peer is gone; the owner then
    closes the port. Everything runs on the event loop that made it. Making one takes about 2 ms;
    raises ``TransportError`` if UCX has no resources left.
    """

    def __init__(self, library: UcxLibrary, context: Any, on_failed: Callable[[str], None]) -> None:
        self._library = library
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        try:
            self._worker = library.api.UCXWorker(context)
            self._worker.init_blocking_progress_mode()
        except library.error as error:
            raise TransportError(f"UCX has no worker for another peer: {error}") from error
        self._endpoint: Any = None
        self._fd = self._worker.epoll_file_descriptor
        self._loop.add_reader(self._fd, self._on_event)
        self._operations: list[Operation] = []
        self._scheduled: asyncio.Handle | None = None
        self._is_backing_off = False
        self._last_progress_s = 0.0

    @property
    def worker_address(self) -> bytes:
        """What the peer's port needs to connect."""
        return bytes(self._worker.address)

    @property
    def num_abandoned(self) -> int:
        """Operations that nobody waits for and whose buffers UCX may still touch."""
        return sum(operation.is_abandoned for operation in self._operations)

    @property
    def abandoned_bytes(self) -> int:
        """The size of those buffers."""
        return sum(
            operation.buffer.nbytes
            for operation in self._operations
            if operation.is_abandoned and operation.buffer is not None
        )

    def connect(self, worker_address: bytes) -> None:
        """Connect to the peer's port; raises ``PeerGone`` if it cannot be reached."""
        api = self._library.api
        try:
            address = api.UCXAddress.create_from_buffer(worker_address)
            self._endpoint = api.UCXEndpoint.create_from_worker_address(self._worker, address, True)
        except self._library.error as error:
            raise PeerGone(f"UCX cannot reach the peer: {error}") from error
        self._kick()

    def post_send(self, buffer: memoryview, tag: int) -> Operation:
        """Start to send a contiguous buffer. Raises ``PeerGone`` if the port is closed."""
        if self._worker is None:
            raise PeerGone("the link is closed")
        tag_object = self._library.api.UCXXTag(tag)
        request = self._endpoint.tag_send(self._library.array(buffer), tag_object)
        return self._started(Operation(request, buffer, None))

    def post_receive(
        self, buffer: memoryview, tag: int, on_end: Callable[[], object] | None = None
    ) -> Operation:
        """Start to receive the next message of this tag, which must fit into ``buffer``.

        ``on_end`` is called when the operation is over, however. Raises ``PeerGone`` if the port
        is closed.
        """
        if self._worker is None:
            raise PeerGone("the link is closed")
        tag_object = self._library.api.UCXXTag(tag)
        request = self._worker.tag_recv(self._library.array(buffer), tag_object)
        return self._started(Operation(request, buffer, on_end))

    async def wait(self, operation: Operation) -> None:
        """Return when the operation is done; raises what it failed with.

        When cancelled, the operation is abandoned: it goes on and keeps its buffer.
        """
        if operation.request is not None:
            operation.future = self._loop.create_future()
            try:
                await operation.future
            except asyncio.CancelledError:
                operation.is_abandoned = True
                raise
        if operation.error is not None:
            raise operation.error

    def cancel(self, operation: Operation, error: TransportError) -> None:
        """End a receive for which nothing has been sent and nothing will be."""
        if operation in self._operations:
            self._operations.remove(operation)
            self._end(operation, error)  # dropping the request takes it out of UCX

    def close(self, reason: str) -> None:
        """Close endpoint and worker; what is not done fails. All buffers are free afterwards."""
        if self._worker is None:
            return
        self._loop.remove_reader(self._fd)
        if self._scheduled is not None:
            self._scheduled.cancel()
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.close_blocking()  # forced, as error handling is on: does not ask the peer
        # The worker goes with the last request that refers to it, so before any buffer does.
        self._worker = None
        del endpoint
        operations, self._operations = self._operations, []
        buffers = [operation.buffer for operation in operations]
        for operation in operations:
            self._end(operation, PeerGone(reason))
        del buffers

    def _started(self, operation: Operation) -> Operation:
        if operation.request.completed:
            self._finish(operation)
        else:
            self._operations.append(operation)
            self._kick()
        return operation

    def _kick(self) -> None:
        if self._is_backing_off and self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        self._is_backing_off = False
        if self._scheduled is None:
            self._scheduled = self._loop.call_soon(self._turn)

    def _on_event(self) -> None:
        if self._scheduled is None or self._is_backing_off:
            self._kick()

    def _turn(self) -> None:
        self._scheduled = None
        self._is_backing_off = False
        start_s = time.monotonic()
        if self._progress(start_s):
            self._last_progress_s = start_s
            self._settle()
            if self._worker is not None:
                self._kick()
        elif not self._worker.arm():
            idle_s = start_s - self._last_progress_s
            if idle_s < _PATIENCE_S:
                self._scheduled = self._loop.call_soon(self._turn)
            else:
                shortest_s, longest_s = _BACKOFF_S
                delay_s = min(max(idle_s / 8, shortest_s), longest_s)
                self._scheduled = self._loop.call_later(delay_s, self._turn)
                self._is_backing_off = True

    def _progress(self, start_s: float) -> bool:
        """Drive UCX until there is nothing to do, or the turn is over. Whether it did anything."""
        progress_once = self._worker.progress_once
        has_progressed = False
        idle_since_s = start_s
        while True:
            now_s = time.monotonic()
            if progress_once():
                has_progressed = True
                idle_since_s = now_s
                if now_s - start_s > _BUDGET_S:
                    return True
            elif not has_progressed or now_s - idle_since_s > _SPIN_S:
                return has_progressed

    def _settle(self) -> None:
        remaining: list[Operation] = []
        done: list[Operation] = []
        for operation in self._operations:
            (done if operation.request.completed else remaining).append(operation)
        if not done:
            return
        self._operations = remaining
        for operation in done:
            self._finish(operation)
        if self._endpoint is not None and not self._endpoint.alive:
            self._on_failed("UCX lost the peer")

    def _finish(self, operation: Operation) -> None:
        error: TransportError | None = None
        try:
            operation.request.check_error()
        except self._library.error as failure:
            error = PeerGone(f"UCX: {failure}")
        self._end(operation, error)

    @staticmethod
    def _end(operation: Operation, error: TransportError | None) -> None:
        operation.request = None
        operation.buffer = None
        operation.error = error
        if operation.future is not None and not operation.future.done():
            operation.future.set_result(None)
        if operation.on_end is not None:
            operation.on_end()
