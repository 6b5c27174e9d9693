"""The receiving half, the same over every transport: subscriptions that decode, run and count."""

import asyncio
import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable

from typing_extensions import override

from shared.bus.base import Handler, Responder, Subscription
from shared.errors import BanyanError, BusError, ProtocolError
from shared.messages.base import ErrorReply, Message, MessageCodec

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 64 * 1024 * 1024
_YIELD_EVERY = 64


def is_worth_logging(count: int) -> bool:
    """Whether the ``count``-th of the same complaint is worth a line: 1, 2, 4, 8 and so on."""
    return count & (count - 1) == 0


class InboundSubscription(Subscription):
    """A subscription as its transport sees it: something to ``offer`` messages to.

    ``detach`` ends the interest in the transport: once it returns nothing more is offered.
    """

    def __init__(
        self,
        subject: str,
        queue: str | None,
        codec: MessageCodec,
        detach: Callable[["InboundSubscription"], Awaitable[None]],
    ) -> None:
        super().__init__(subject, queue)
        self._codec = codec
        self._detach = detach
        self._is_ending = False
        self._is_detached = False

    @abstractmethod
    async def offer(self, data: bytes, subject: str, reply: str | None) -> None:
        """Take one message. Never waits for the handler."""

    @abstractmethod
    async def _finish(self, deadline_s: float, caller: asyncio.Task[None] | None) -> None:
        """Handle what has arrived, until ``deadline_s``, without waiting for ``caller``."""

    @override
    async def unsubscribe(self, *, timeout_s: float = 5.0) -> None:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        await self.end(deadline_s, asyncio.current_task())

    async def end(self, deadline_s: float, caller: asyncio.Task[None] | None) -> None:
        """``unsubscribe`` on behalf of the task ``caller``, which may be one of the handlers.

        ``deadline_s`` is on the loop's clock.
        """
        if self._is_ending:
            return
        self._is_ending = True
        try:
            await self._detach(self)
        finally:
            # Until here messages may still arrive, and those are to be handled.
            self._is_detached = True
            await self._finish(deadline_s, caller)

    def _decode(self, data: bytes, subject: str) -> Message:
        """The message; a failure is counted and logged before it is raised."""
        try:
            return self._codec.decode(data)
        except ProtocolError as error:
            self.num_failed += 1
            if is_worth_logging(self.num_failed):
                logger.warning("bad message no. %d on %s: %s", self.num_failed, subject, error)
            raise


class HandlerSubscription(InboundSubscription):
    """One message at a time, in order, from a bounded queue whose oldest gives way."""

    def __init__(
        self,
        subject: str,
        queue: str | None,
        codec: MessageCodec,
        detach: Callable[[InboundSubscription], Awaitable[None]],
        handler: Handler,
        max_pending: int,
    ) -> None:
        super().__init__(subject, queue, codec, detach)
        self._handler = handler
        self._max_pending = max_pending
        self._pending: deque[tuple[bytes, str]] = deque()
        self._pending_bytes = 0
        self._has_news = asyncio.Event()
        self._worker = asyncio.create_task(self._work(), name=f"subscription {subject}")

    @override
    async def offer(self, data: bytes, subject: str, reply: str | None) -> None:
        self.num_received += 1
        self._pending.append((data, subject))
        self._pending_bytes += len(data)
        while len(self._pending) > self._max_pending or self._pending_bytes > MAX_PENDING_BYTES:
            self._pending_bytes -= len(self._pending.popleft()[0])
            self.num_dropped += 1
            if is_worth_logging(self.num_dropped):
                logger.warning("%s: %d messages dropped (slow handler)", subject, self.num_dropped)
        if not self._has_news.is_set():
            self._has_news.set()

    async def _work(self) -> None:
        num_handled = 0
        while not (self._is_detached and not self._pending):
            if not self._pending:
                self._has_news.clear()
                await self._has_news.wait()
                continue
            data, subject = self._pending.popleft()
            self._pending_bytes -= len(data)
            await self._handle(data, subject)
            num_handled += 1
            if num_handled % _YIELD_EVERY == 0:
                # A handler that never suspends must not keep the loop from everything else.
                await asyncio.sleep(0)

    async def _handle(self, data: bytes, subject: str) -> None:
        try:
            message = self._decode(data, subject)
        except ProtocolError:
            return
        try:
            await self._handler(message, subject)
        except Exception:
            self.num_failed += 1
            logger.exception("the handler of %s failed on %s", subject, type(message).__name__)

    @override
    async def _finish(self, deadline_s: float, caller: asyncio.Task[None] | None) -> None:
        self._has_news.set()
        if self._worker is caller:
            return
        remaining_s = deadline_s - asyncio.get_running_loop().time()
        _, late = await asyncio.wait({self._worker}, timeout=max(remaining_s, 0.0))
        if late:
            logger.warning(
                "%s: cancelling a handler at its deadline, %d messages left unhandled",
                self.subject,
                len(self._pending),
            )
            self.num_dropped += len(self._pending)
            self._pending.clear()
            self._worker.cancel()
            await asyncio.wait({self._worker})


class ServiceSubscription(InboundSubscription):
    """Each request its own task, at most ``max_concurrency`` of them, every one answered."""

    def __init__(
        self,
        subject: str,
        queue: str | None,
        codec: MessageCodec,
        detach: Callable[[InboundSubscription], Awaitable[None]],
        handler: Responder,
        max_concurrency: int,
        send: Callable[[str, Message], Awaitable[None]],
    ) -> None:
        super().__init__(subject, queue, codec, detach)
        self._handler = handler
        self._max_concurrency = max_concurrency
        self._send = send
        self._running: dict[asyncio.Task[None], str | None] = {}

    @override
    async def offer(self, data: bytes, subject: str, reply: str | None) -> None:
        self.num_received += 1
        if len(self._running) >= self._max_concurrency:
            self.num_dropped += 1
            if is_worth_logging(self.num_dropped):
                logger.warning("%s: %d requests refused (overloaded)", subject, self.num_dropped)
            message = f"{self._max_concurrency} requests are running"
            await self._reply(reply, ErrorReply(code="Overloaded", message=message))
            return
        task = asyncio.create_task(self._serve(data, subject, reply))
        self._running[task] = reply
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)

    async def _serve(self, data: bytes, subject: str, reply: str | None) -> None:
        try:
            request = self._decode(data, subject)
        except ProtocolError as error:
            await self._reply(reply, ErrorReply(code=type(error).__name__, message=str(error)))
            return
        try:
            answer = await self._handler(request)
        except BanyanError as error:
            answer = ErrorReply(code=type(error).__name__, message=str(error))
        except Exception as error:
            self.num_failed += 1
            logger.exception("the handler of %s failed on %s", subject, type(request).__name__)
            answer = ErrorReply(code="InternalError", message=f"{type(error).__name__}: {error}")
        await self._reply(reply, answer)

    async def _reply(self, reply: str | None, answer: Message) -> None:
        if reply is None:
            return
        try:
            try:
                await self._send(reply, answer)
            except (ProtocolError, TypeError, ValueError) as error:
                self.num_failed += 1
                logger.exception("the reply on %s cannot be sent", self.subject)
                await self._send(reply, ErrorReply(code="ProtocolError", message=str(error)))
        except BusError as error:
            # The requester lost us as we lost it, and asks again.
            logger.info("a reply on %s was not sent: %s", self.subject, error)

    @override
    async def _finish(self, deadline_s: float, caller: asyncio.Task[None] | None) -> None:
        others = {task for task in self._running if task is not caller}
        if not others:
            return
        remaining_s = deadline_s - asyncio.get_running_loop().time()
        _, late = await asyncio.wait(others, timeout=max(remaining_s, 0.0))
        if not late:
            return
        logger.warning("%s: cancelling %d requests at their deadline", self.subject, len(late))
        replies = [self._running[task] for task in late if task in self._running]
        self.num_dropped += len(late)
        for task in late:
            task.cancel()
        await asyncio.wait(late)
        for reply in replies:
            message = "the service ended before the request was done"
            await self._reply(reply, ErrorReply(code="Cancelled", message=message))
