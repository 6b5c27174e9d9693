"""A connection to NATS that is made again whenever it breaks.

nats-py can reconnect by itself. It is not used, because its connection can also end for good
without our asking (most ``-ERR`` lines do that), can wait without end for a peer that vanished, and
keeps what was published meanwhile to send it late. Here there is one way back from every kind of
loss: throw the client away, dial a new one, subscribe again.
"""

import asyncio
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription

from shared.bus.inbound import is_worth_logging
from shared.errors import BusDisconnected, BusTimeout, ConfigError

logger = logging.getLogger(__name__)

_DENIED = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')
_WATCHDOG_S = 1.0
_DISCARD_S = 2.0
_FOREVER_S = 86_400

LOST_ERRORS = (nats.errors.Error, OSError, RuntimeError)
"""What the client raises when its connection is gone; ``RuntimeError`` is uvloop's."""


@dataclass(frozen=True)
class NatsOptions:
    """How to connect. Times are seconds; ``reconnect_wait_s`` is between two attempts."""

    servers: tuple[str, ...]
    name: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    connect_timeout_s: float = 10.0
    reconnect_wait_s: float = 0.1
    ping_interval_s: float = 2.0

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for an address that is none."""
        if not self.servers:
            raise ConfigError("no NATS server is named")
        for server in self.servers:
            url = urlsplit(server)
            try:
                is_usable = url.scheme in ("nats", "tls", "ws", "wss") and bool(url.hostname)
                is_usable = is_usable and url.port != 0
            except ValueError:
                is_usable = False
            if not is_usable:
                raise ConfigError(f"not the address of a NATS server: {server!r}")


class NatsLink:
    """One life of the connection. ``lost`` is done as soon as that life is over."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._subscriptions: set[ClientSubscription] = set()
        self._round_trips: set[asyncio.Task[None]] = set()

    @property
    def is_alive(self) -> bool:
        """Whether this life lasts, as far as one knows."""
        return not self.lost.done() and bool(self.client.is_connected)

    def mark_lost(self) -> None:
        """This life is over."""
        if not self.lost.done():
            self.lost.set_result(None)

    async def subscribe(
        self, subject: str, queue: str | None, take: Callable[[Msg], Awaitable[None]]
    ) -> ClientSubscription:
        """Have ``take``, which must be quick, called for what comes on ``subject``.

        Raises ``BusDisconnected``.
        """
        try:
            inner = await self.client.subscribe(subject, queue=queue or "", cb=take)
        except LOST_ERRORS as error:
            raise BusDisconnected(f"the connection to NATS was lost: {error!r}") from error
        self._subscriptions.add(inner)
        return inner

    async def unsubscribe(self, inner: ClientSubscription, timeout_s: float) -> None:
        """End ``inner`` after all that the server sent for it until now; never raises."""
        self._subscriptions.discard(inner)
        try:
            if self.is_alive:
                await self._round_trip(inner.drain(), timeout_s)  # type: ignore[no-untyped-call]
            else:
                await inner.unsubscribe()
        except (BusDisconnected, BusTimeout, *LOST_ERRORS) as error:
            logger.debug("unsubscribing from %s: %r", inner.subject, error)

    async def flush(self, timeout_s: float) -> None:
        """Wait until the server has processed all we sent.

        Raises ``BusTimeout``, or ``BusDisconnected`` if the link is lost.
        """
        await self._round_trip(self.client.flush(timeout=_FOREVER_S), timeout_s)

    async def _round_trip(self, work: Coroutine[Any, Any, None], timeout_s: float) -> None:
        # nats-py's reader dies of a PONG whose waiter was cancelled, so the waiter is a task of
        # its own, which a cancelled or impatient caller leaves alone.
        task = asyncio.create_task(work)
        self._round_trips.add(task)
        task.add_done_callback(self._round_trips.discard)
        await asyncio.wait(
            {task, self.lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not task.done():
            if self.lost.done():
                raise BusDisconnected("the connection to NATS was lost")
            raise BusTimeout(f"NATS did not answer a ping within {timeout_s:g} s")
        try:
            task.result()
        except (asyncio.CancelledError, *LOST_ERRORS) as error:
            raise BusDisconnected(f"the connection to NATS was lost: {error!r}") from error

    async def discard(self) -> None:
        """Close the client, however broken it is."""
        self.mark_lost()
        for task in tuple(self._round_trips):
            task.cancel()
        # One by one, since a client that fails to flush while it closes leaves their tasks behind.
        for inner in tuple(self._subscriptions):
            await self.unsubscribe(inner, 0.0)
        try:
            async with asyncio.timeout(_DISCARD_S):
                await self.client.close()
        except (*LOST_ERRORS, TimeoutError) as error:
            logger.debug("closing a lost connection: %r", error)


class NatsConnection:
    """Dials, watches and dials again, until closed.

    ``on_connected`` gets each new link to subscribe on before it counts as up; ``on_up`` and
    ``on_down(reason)`` follow; ``on_denied(kind, subject)`` says what the permissions forbade
    (``kind`` is ``publish`` or ``subscription``, ``subject`` is in lower case, as nats-py tells
    it). ``num_permission_violations`` and ``num_slow_consumer_errors`` only grow.
    """

    def __init__(
        self,
        options: NatsOptions,
        *,
        inbox_prefix: str,
        on_connected: Callable[[NatsLink], Awaitable[None]],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_denied: Callable[[str, str], None],
    ) -> None:
        self._options = options
        self._inbox_prefix = inbox_prefix
        self._on_connected = on_connected
        self._on_up = on_up
        self._on_down = on_down
        self._on_denied = on_denied
        self._link: NatsLink | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first_up: asyncio.Future[None] | None = None
        self._is_closing = False
        self._num_errors_in_row = 0
        self._last_error: Exception | None = None
        self.num_permission_violations = 0
        self.num_slow_consumer_errors = 0

    @property
    def is_up(self) -> bool:
        """Whether there is a living link."""
        return self._link is not None and self._link.is_alive

    def link(self) -> NatsLink:
        """The living link. Raises ``BusDisconnected`` if there is none."""
        if self._link is None or not self._link.is_alive:
            raise BusDisconnected("there is no connection to NATS")
        return self._link

    async def open(self) -> None:
        """Wait for the first connection. Raises ``BusDisconnected`` or ``ConfigError``."""
        self._first_up = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="nats connection")
        timeout_s = self._options.connect_timeout_s
        try:
            await asyncio.wait({self._first_up}, timeout=timeout_s)
            if self._first_up.done():
                self._first_up.result()
                return
            raise BusDisconnected(
                f"no connection to NATS at {', '.join(self._options.servers)} within "
                f"{timeout_s:g} s: {self._last_error!r}"
            )
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Disconnect for good."""
        self._is_closing = True
        while self._supervisor is not None and not self._supervisor.done():
            # More than once, because nats-py swallows a cancellation in some places.
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor}, timeout=0.1)
        if self._first_up is not None:
            self._first_up.cancel()

    async def _supervise(self) -> None:
        while not self._is_closing:
            link = NatsLink(Client())
            try:
                await self._dial(link)
                await self._on_connected(link)
                self._link = link
                self._num_errors_in_row = 0
                self._on_up()
                if self._first_up is not None and not self._first_up.done():
                    self._first_up.set_result(None)
                await self._watch(link)
                logger.warning("lost the connection to NATS: %r", self._last_error)
            except Exception as error:
                # Of whatever kind: a bus that stays silent for ever is worse than one more attempt.
                self._last_error = error
                logger.warning("could not use a connection to NATS", exc_info=True)
                await asyncio.sleep(self._options.reconnect_wait_s)
            finally:
                if self._link is link:
                    self._link = None
                    self._on_down("the connection to NATS was lost")
                await link.discard()

    async def _dial(self, link: NatsLink) -> None:
        """Connect ``link``, however long it takes."""
        options = self._options

        async def disconnected() -> None:
            link.mark_lost()
            if not link.client.is_closed:
                # Parks nats-py's own reconnecting until ``discard`` cancels it.
                await asyncio.get_running_loop().create_future()

        async def closed() -> None:
            link.mark_lost()

        await link.client.connect(
            servers=list(options.servers),
            name=options.name,
            user=options.user,
            password=options.password,
            tls=options.tls,
            inbox_prefix=self._inbox_prefix,
            error_cb=self._note_error,
            disconnected_cb=disconnected,
            closed_cb=closed,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=options.reconnect_wait_s,  # type: ignore[arg-type]
            ping_interval=options.ping_interval_s,  # type: ignore[arg-type]
            max_outstanding_pings=2,
            flush_timeout=1.0,
        )

    async def _watch(self, link: NatsLink) -> None:
        """Return once ``link`` is lost."""
        while link.is_alive:
            # The timeout is a watchdog: a client that was closed by an error from the server, or
            # hangs in closing a socket to a vanished peer, calls none of its callbacks.
            await asyncio.wait({link.lost}, timeout=_WATCHDOG_S)

    async def _note_error(self, error: Exception) -> None:
        """Count and log what nats-py reports; it says so nowhere else."""
        text = str(error).lower()
        denied = _DENIED.search(text)
        if denied is not None:
            self.num_permission_violations += 1
            logger.error("user %s is not permitted: %s", self._options.user, error)
            self._on_denied(denied[1], denied[2])
        elif isinstance(error, nats.errors.SlowConsumerError):
            self.num_slow_consumer_errors += 1
            if is_worth_logging(self.num_slow_consumer_errors):
                logger.error("%s (no. %d)", error, self.num_slow_consumer_errors)
        else:
            self._note_connection_error(error, "authorization violation" in text)

    def _note_connection_error(self, error: Exception, is_refusal: bool) -> None:
        self._last_error = error
        self._num_errors_in_row += 1
        if is_worth_logging(self._num_errors_in_row):
            level = logging.ERROR if is_refusal else logging.WARNING
            logger.log(level, "NATS: %r (no. %d in a row)", error, self._num_errors_in_row)
        if is_refusal and self._first_up is not None and not self._first_up.done():
            self._first_up.set_exception(
                ConfigError(f"NATS refuses the credentials of user {self._options.user!r}")
            )
