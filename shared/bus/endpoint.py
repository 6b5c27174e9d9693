"""What every bus does the same way: typed messages over a transport that moves bytes."""

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from typing_extensions import override

from shared.bus.base import Bus, Handler, M, ReconnectListener, Responder, Subscription
from shared.bus.inbound import HandlerSubscription, InboundSubscription, ServiceSubscription
from shared.bus.leases import LeaseWatch
from shared.bus.replies import PendingReplies, PendingRequest, RawReply
from shared.bus.subjects import check_pattern, check_subject
from shared.clock import Clock
from shared.errors import BusDisconnected, NoResponder, ProtocolError, RemoteError
from shared.messages.base import ErrorReply, Message, MessageCodec

logger = logging.getLogger(__name__)


def too_large(data: bytes, max_payload_bytes: int) -> ProtocolError:
    """The error for a message the server would not take."""
    return ProtocolError(
        f"a message of {len(data)} bytes is larger than the bus's max_payload of "
        f"{max_payload_bytes} bytes"
    )


class BusEndpoint(Bus):
    """The typed layer.

    A transport implements what is under ``Transport`` and says ``_went_up`` and ``_went_down``; it
    gives ``_replies`` what arrives on ``{inbox}.{token}``.
    """

    def __init__(self, codec: MessageCodec, *, inbox: str, clock: Clock) -> None:
        if ErrorReply not in codec.types:
            raise ValueError("the codec of a bus must know ErrorReply")
        self._codec = codec
        self._clock = clock
        self._inbox = inbox
        self._replies = PendingReplies()
        self._subscriptions: set[InboundSubscription] = set()
        self._watches: set[LeaseWatch] = set()
        self._listeners: list[ReconnectListener] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._connected_since_s: float | None = None
        self._num_connections = 0
        self._is_closing = False
        self._is_closed = False

    # Transport

    @abstractmethod
    async def _send(self, subject: str, data: bytes, reply: str | None) -> None:
        """Hand over one message.

        Raises ``BusDisconnected``, and ``ProtocolError`` if it is larger than ``max_payload``.
        """

    @abstractmethod
    async def _attach(self, subscription: InboundSubscription) -> None:
        """Begin to offer. Raises ``BusError``s, and then offers nothing."""

    @abstractmethod
    async def _detach(self, subscription: InboundSubscription) -> None:
        """Stop to offer, after what the server sent until now; works without a connection."""

    @abstractmethod
    async def _hang_up(self, deadline_s: float) -> None:
        """Disconnect for good, at the latest at ``deadline_s`` on the loop's clock."""

    # Connection

    def _went_up(self) -> None:
        """The connection is there, and all subscriptions with it."""
        self._connected_since_s = self._clock.now_s()
        self._num_connections += 1
        if self._num_connections > 1:
            for listener in tuple(self._listeners):
                self._spawn(self._notify(listener))

    def _went_down(self, reason: str) -> None:
        """The connection is gone."""
        self._connected_since_s = None
        self._replies.fail_where(lambda _: True, lambda: BusDisconnected(reason))

    async def _notify(self, listener: ReconnectListener) -> None:
        try:
            await listener()
        except Exception:
            logger.exception("a reconnect listener failed")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` has ended the connection for good."""
        return self._is_closed

    @property
    @override
    def is_connected(self) -> bool:
        return self._connected_since_s is not None

    @override
    def connected_since_s(self) -> float | None:
        return self._connected_since_s if self.is_connected else None

    @override
    def may_judge_leases(self, ttl_s: float) -> bool:
        since_s = self.connected_since_s()
        if since_s is None:
            return False
        return self._num_connections == 1 or self._clock.now_s() - since_s >= ttl_s

    @override
    def add_reconnect_listener(self, listener: ReconnectListener) -> Callable[[], None]:
        self._listeners.append(listener)

        def remove() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return remove

    @override
    async def close(self, *, timeout_s: float = 5.0) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        caller = asyncio.current_task()
        try:
            await asyncio.gather(
                *(one.end(deadline_s, caller) for one in tuple(self._subscriptions))
            )
        finally:  # also when whoever waits for the drain gives it up
            self._is_closed = True
            await asyncio.gather(*(watch.aclose() for watch in tuple(self._watches)))
            await self._hang_up(deadline_s)
            self._went_down("the bus was closed")
            await self._cancel_tasks()

    async def _cancel_tasks(self) -> None:
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # Sending

    async def _publish(self, subject: str, message: Message) -> None:
        await self._send(subject, self._codec.encode(message), None)

    @override
    async def publish(self, subject: str, message: Message) -> None:
        check_subject(subject)
        await self._publish(subject, message)

    @override
    async def request(
        self, subject: str, message: Message, reply_type: type[M], *, timeout_s: float
    ) -> M:
        check_subject(subject)
        data = self._codec.encode(message)
        reply = await self._ask(
            subject, lambda reply_to: self._send(subject, data, reply_to), timeout_s
        )
        return self._typed(subject, reply, reply_type)

    async def _ask(
        self, subject: str, send: Callable[[str], Awaitable[None]], timeout_s: float
    ) -> RawReply:
        """Have ``send`` send a request that names its argument as reply subject; the answer."""
        token, request = self._replies.open(subject, 1)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout_s, self._replies.expire, token, timeout_s)
        try:
            await send(f"{self._inbox}.{token}")
            await request.done
            return request.answers[0]
        finally:
            timer.cancel()
            self._replies.close(token)

    @override
    async def request_many(
        self,
        subject: str,
        message: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
        expected: int | None = None,
    ) -> list[M]:
        check_subject(subject)
        if expected == 0:
            return []
        data = self._codec.encode(message)
        token, request = self._replies.open(subject, expected)
        timer = asyncio.get_running_loop().call_later(timeout_s, request.finish)
        try:
            await self._send(subject, data, f"{self._inbox}.{token}")
            await self._gather(request)
        finally:
            timer.cancel()
            self._replies.close(token)
        return self._typed_many(subject, request.answers, reply_type)

    async def _gather(self, request: PendingRequest) -> None:
        try:
            await request.done
        except NoResponder:
            logger.info("nobody serves %s", request.subject)

    def _typed(self, subject: str, reply: RawReply, reply_type: type[M]) -> M:
        answer = self._codec.decode(reply.data)
        if isinstance(answer, reply_type):
            return answer
        if isinstance(answer, ErrorReply):
            raise RemoteError(answer.code, answer.message)
        raise ProtocolError(
            f"{subject} answered with a {type(answer).__name__} instead of a {reply_type.__name__}"
        )

    def _typed_many(self, subject: str, replies: list[RawReply], reply_type: type[M]) -> list[M]:
        answers = []
        for reply in replies:
            try:
                answers.append(self._typed(subject, reply, reply_type))
            except RemoteError as error:
                logger.warning("one of %s answered %s: %s", subject, error.code, error)
            except ProtocolError as error:
                logger.warning("one of %s gave a bad answer: %s", subject, error)
        return answers

    # Receiving

    @override
    async def subscribe(
        self,
        subject: str,
        handler: Handler,
        *,
        queue: str | None = None,
        max_pending: int = 65536,
    ) -> Subscription:
        check_pattern(subject)
        return await self._begin(
            HandlerSubscription(subject, queue, self._codec, self._end, handler, max_pending)
        )

    @override
    async def serve(
        self,
        subject: str,
        handler: Responder,
        *,
        queue: str | None = None,
        max_concurrency: int = 256,
    ) -> Subscription:
        check_pattern(subject)
        return await self._begin(
            ServiceSubscription(
                subject, queue, self._codec, self._end, handler, max_concurrency, self._publish
            )
        )

    async def _begin(self, subscription: InboundSubscription) -> Subscription:
        if self._is_closing:
            await subscription.unsubscribe(timeout_s=0.0)
            raise BusDisconnected("the bus was closed")
        self._subscriptions.add(subscription)
        try:
            await self._attach(subscription)
        except BaseException:
            await subscription.unsubscribe(timeout_s=0.0)
            raise
        return subscription

    async def _end(self, subscription: InboundSubscription) -> None:
        self._subscriptions.discard(subscription)
        await self._detach(subscription)
