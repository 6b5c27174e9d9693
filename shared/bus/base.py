"""The contract of the bus; every implementation passes the same tests of it."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

from shared.bus.leases import LeaseStore
from shared.messages.base import Message

M = TypeVar("M", bound=Message)

Handler = Callable[[Message, str], Awaitable[None]]
"""What a subscriber does with a message and the subject it came on."""

Responder = Callable[[Message], Awaitable[Message]]
"""What a server does with a request; what it returns is the reply."""

ReconnectListener = Callable[[], Awaitable[None]]
"""Called after the connection was lost and made again, with all subscriptions in place."""


class Subscription(ABC):
    """Interest in one subject, until ``unsubscribe`` or the bus's ``close``; outlives reconnects.

    Counters only grow: ``num_received`` messages that reached this process, ``num_dropped`` of
    them thrown away unhandled (overflow, overload, deadline of ``unsubscribe``), ``num_failed`` of
    them that were no known message or whose handler raised something unexpected.
    """

    def __init__(self, subject: str, queue: str | None) -> None:
        self.subject = subject
        self.queue = queue
        self.num_received = 0
        self.num_dropped = 0
        self.num_failed = 0

    @abstractmethod
    async def unsubscribe(self, *, timeout_s: float = 5.0) -> None:
        """End the interest, then wait until what has arrived is handled.

        Handlers still running after ``timeout_s`` are cancelled; a request cut off like that is
        answered with ``ErrorReply(code="Cancelled")``. Called by a handler of this very
        subscription it does not wait for that handler. A second call does nothing.
        """


class Bus(ABC):
    """One connection to the control plane. Messages are encoded by the codec given to it.

    Subjects are dot-separated tokens; a subscriber may use ``*`` for one token and a final ``>``
    for one or more. A subject that is empty, has an empty token or white space raises
    ``ValueError``. Delivery is at most once: what is published while a subscriber is away is gone.
    All methods belong to the event loop that called ``connect``.
    """

    @abstractmethod
    async def connect(self) -> None:
        """Connect for the first time; from then on a lost connection is made again by itself.

        Raises ``BusDisconnected`` if nothing answers in time and ``ConfigError`` if the
        credentials are refused.
        """

    @abstractmethod
    async def close(self, *, timeout_s: float = 5.0) -> None:
        """Drain and disconnect for good, also while reconnecting. A second call does nothing.

        Drain: subscriptions end, what has arrived is handled for at most ``timeout_s``, then the
        rest is dropped and counted. Requests of our own that still wait raise ``BusDisconnected``;
        lease watches end. Leases are not released: that is their owner's decision.
        """

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether messages can be sent now."""

    @abstractmethod
    def connected_since_s(self) -> float | None:
        """When the present connection was made, on this bus's own clock; ``None`` without one."""

    @abstractmethod
    def may_judge_leases(self, ttl_s: float) -> bool:
        """Whether an absent lease means an absent holder.

        False while disconnected and for ``ttl_s`` after a reconnect, because the holders lost
        their connection too and need that long to come back.
        """

    @abstractmethod
    def add_reconnect_listener(self, listener: ReconnectListener) -> Callable[[], None]:
        """Have ``listener`` called after each reconnect (not after the first connect).

        Each call is a task of the bus; what it raises is logged. Returns what removes it again.
        """

    @abstractmethod
    async def publish(self, subject: str, message: Message) -> None:
        """Send to every subscriber, and to one member of each queue group.

        Returns when the message is handed to the connection, not when anybody has it; messages of
        one publisher to one subject arrive in order. Raises ``ProtocolError`` if the encoded
        message is larger than the server's ``max_payload`` and ``BusDisconnected`` while there is
        no connection: nothing is kept to be sent later, since a late command is worse than none.
        """

    @abstractmethod
    async def flush(self, *, timeout_s: float = 5.0) -> None:
        """Wait until the server has everything published before.

        Raises ``BusTimeout`` or ``BusDisconnected``.
        """

    @abstractmethod
    async def subscribe(
        self,
        subject: str,
        handler: Handler,
        *,
        queue: str | None = None,
        max_pending: int = 65536,
    ) -> Subscription:
        """Have ``handler`` called for each message on ``subject``, one at a time and in order.

        Returns once the server knows the subscription. Of the subscriptions that name the same
        ``queue`` one gets each message. When ``max_pending`` messages (or 64 MiB) wait, the oldest
        is dropped for each new one, and counted: for loads and token streams the newest is worth
        most. Bytes that are no known message are logged and counted; an exception of ``handler``
        is logged with its traceback and counted. Neither ends the subscription.

        Raises ``BusDisconnected``, and ``BusError`` if the permissions forbid it.
        """

    @abstractmethod
    async def serve(
        self,
        subject: str,
        handler: Responder,
        *,
        queue: str | None = None,
        max_concurrency: int = 256,
    ) -> Subscription:
        """Answer requests on ``subject``. Each runs as its own task, owned by the subscription.

        Every request is answered: with what ``handler`` returns, or with an ``ErrorReply`` whose
        ``code`` is

        ===================  =====================================================================
        class name           ``handler`` raised that ``BanyanError`` (an answer, not a failure)
        ``InternalError``    it raised anything else (logged with traceback, counted as failed)
        ``ProtocolError``    the request, or the reply, cannot be encoded or decoded
        ``UnknownMessage``   the request's tag is not known here
        ``Overloaded``       ``max_concurrency`` requests are running (counted as dropped)
        ``Cancelled``        the subscription ended before the handler did
        ===================  =====================================================================

        A message published here without a reply subject is handled; its reply goes nowhere.
        Raises ``BusDisconnected``, and ``BusError`` if the permissions forbid it.
        """

    @abstractmethod
    async def request(
        self, subject: str, message: Message, reply_type: type[M], *, timeout_s: float
    ) -> M:
        """Ask, and wait for the first answer.

        Raises ``NoResponder`` at once if nobody serves ``subject``, ``BusTimeout`` after
        ``timeout_s``, ``BusDisconnected`` if there is no connection or it breaks meanwhile,
        ``RemoteError`` for an ``ErrorReply``, ``ProtocolError`` for an answer that is not a
        ``reply_type`` or a request larger than ``max_payload``, and ``BusError`` if the
        permissions forbid it. After ``BusTimeout`` and ``BusDisconnected`` the request may or may
        not have been carried out: requests must be idempotent.
        """

    @abstractmethod
    async def request_many(
        self,
        subject: str,
        message: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
        expected: int | None = None,
    ) -> list[M]:
        """Ask all that serve ``subject``, and gather the answers in their order of arrival.

        Returns when ``expected`` have answered or ``timeout_s`` is over, and at once if nobody
        serves it. An ``ErrorReply`` or an answer of another type counts as an answer, is logged
        and left out. Raises ``BusDisconnected`` if the connection is missing or breaks: part of
        the answers must not pass for all of them.
        """

    @abstractmethod
    async def lease_store(self, ttl_s: float) -> LeaseStore:
        """The store of the leases that last ``ttl_s`` (at least 0.5 s); made on first use.

        Raises ``BusError`` (or a subclass) if the store cannot be made or reached.
        """

    async def __aenter__(self) -> Self:
        """Connect."""
        await self.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()
