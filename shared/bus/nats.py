"""The bus over NATS."""

import asyncio
import logging
import secrets
import ssl
from collections.abc import Iterable, Mapping

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription
from typing_extensions import override

from shared.bus.endpoint import BusEndpoint, too_large
from shared.bus.inbound import InboundSubscription
from shared.bus.leases import LeaseStore, LeaseWatch
from shared.bus.names import inbox_prefix
from shared.bus.nats_connection import LOST_ERRORS, NatsConnection, NatsLink, NatsOptions
from shared.bus.nats_leases import NatsLeaseStore
from shared.bus.replies import RawReply
from shared.clock import Clock, MonotonicClock
from shared.errors import BusDisconnected, BusError, BusTimeout
from shared.messages.base import MessageCodec

logger = logging.getLogger(__name__)

_MAX_BUFFERED_BYTES = 32 * 1024 * 1024
_ROUND_TRIP_S = 5.0
_NO_RESPONDERS = "503"


class NatsBus(BusEndpoint):
    """See ``Bus``. Connects as ``user`` to any of ``servers`` (``nats://host:port``).

    ``name`` is shown in the server's monitoring. Replies come to subjects under
    ``_INBOX_<user>.``, so that users can be kept from reading each other's.

    What the permissions forbid raises ``BusError`` where that can be known: ``subscribe``,
    ``serve``, ``request``, ``request_many``. A forbidden ``publish`` cannot be: it is logged as an
    error and counted in ``num_permission_violations``.
    """

    def __init__(
        self,
        codec: MessageCodec,
        servers: str | Iterable[str],
        *,
        name: str,
        user: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float = 10.0,
        reconnect_wait_s: float = 0.1,
        ping_interval_s: float = 2.0,
        clock: Clock | None = None,
    ) -> None:
        prefix = inbox_prefix(user)
        super().__init__(
            codec, inbox=f"{prefix}.{secrets.token_hex(8)}", clock=clock or MonotonicClock()
        )
        self._connection = NatsConnection(
            NatsOptions(
                servers=(servers,) if isinstance(servers, str) else tuple(servers),
                name=name,
                user=user,
                password=password,
                tls=tls,
                connect_timeout_s=connect_timeout_s,
                reconnect_wait_s=reconnect_wait_s,
                ping_interval_s=ping_interval_s,
            ),
            inbox_prefix=prefix,
            on_connected=self._subscribe_all,
            on_up=self._went_up,
            on_down=self._went_down,
            on_denied=self._denied,
        )
        self._attached: dict[InboundSubscription, tuple[NatsLink, ClientSubscription]] = {}
        self._denied_subjects: set[str] = set()

    @property
    def num_permission_violations(self) -> int:
        """How often the server refused a publish or a subscription of ours."""
        return self._connection.num_permission_violations

    @property
    def num_slow_consumer_errors(self) -> int:
        """How often the client library itself dropped a message because the loop was too slow."""
        return self._connection.num_slow_consumer_errors

    @override
    async def connect(self) -> None:
        await self._connection.open()

    @property
    @override
    def is_connected(self) -> bool:
        return self._connection.is_up

    @override
    async def flush(self, *, timeout_s: float = 5.0) -> None:
        await self._connection.link().flush(timeout_s)

    @override
    async def lease_store(self, ttl_s: float) -> LeaseStore:
        store = NatsLeaseStore(self, ttl_s)
        await store.make_bucket()
        return store

    # Transport

    @override
    async def _send(self, subject: str, data: bytes, reply: str | None) -> None:
        await self._send_raw(subject, data, reply, None)

    async def _send_raw(
        self, subject: str, data: bytes, reply: str | None, headers: dict[str, str] | None
    ) -> None:
        client = self._connection.link().client
        if client.pending_data_size > _MAX_BUFFERED_BYTES:
            raise BusDisconnected("NATS takes no data: the outbound buffer is full")
        try:
            await client.publish(subject, data, reply=reply or "", headers=headers)
        except nats.errors.BadSubjectError as error:
            raise ValueError(f"not a subject: {subject!r}") from error
        except nats.errors.MaxPayloadError as error:
            raise too_large(data, client.max_payload) from error
        except LOST_ERRORS as error:
            raise BusDisconnected(f"the connection to NATS was lost: {error!r}") from error

    async def ask_raw(
        self,
        subject: str,
        data: bytes,
        *,
        timeout_s: float,
        headers: dict[str, str] | None = None,
    ) -> RawReply:
        """``request`` for bytes and headers, which is what JetStream's API speaks.

        Raises ``NoResponder``, ``BusTimeout``, ``BusDisconnected``, and ``BusError`` if forbidden.
        """
        return await self._ask(
            subject, lambda reply_to: self._send_raw(subject, data, reply_to, headers), timeout_s
        )

    def raw_link(self) -> NatsLink:
        """The living connection, for what JetStream pushes. Raises ``BusDisconnected``."""
        return self._connection.link()

    def new_inbox(self) -> str:
        """A fresh subject that only this user may subscribe to."""
        return f"{self._inbox}.{secrets.token_hex(8)}.push"

    def own_watch(self, watch: LeaseWatch) -> None:
        """Have ``watch`` closed with the bus."""
        self._watches.add(watch)

    def disown_watch(self, watch: LeaseWatch) -> None:
        """``watch`` was closed."""
        self._watches.discard(watch)

    async def _subscribe_all(self, link: NatsLink) -> None:
        """Restore on a new link all that was on the last one."""
        await link.subscribe(f"{self._inbox}.*", None, self._take_reply)
        for subscription in tuple(self._attached):
            await self._subscribe_on(link, subscription)
        await link.flush(_ROUND_TRIP_S)

    async def _subscribe_on(self, link: NatsLink, subscription: InboundSubscription) -> None:
        async def take(msg: Msg) -> None:
            await subscription.offer(msg.data, msg.subject, msg.reply or None)

        inner = await link.subscribe(subscription.subject, subscription.queue, take)
        self._attached[subscription] = (link, inner)

    @override
    async def _attach(self, subscription: InboundSubscription) -> None:
        link = self._connection.link()
        subject = subscription.subject.lower()
        self._denied_subjects.discard(subject)
        await self._subscribe_on(link, subscription)
        # The server reports a refusal before it answers the ping that follows.
        await link.flush(_ROUND_TRIP_S)
        if subject in self._denied_subjects:
            raise BusError(f"the permissions forbid a subscription to {subscription.subject}")

    @override
    async def _detach(self, subscription: InboundSubscription) -> None:
        if subscription in self._attached:
            link, inner = self._attached.pop(subscription)
            await link.unsubscribe(inner, _ROUND_TRIP_S)

    async def _take_reply(self, msg: Msg) -> None:
        token = msg.subject[len(self._inbox) + 1 :]
        headers: Mapping[str, str] = msg.headers or {}
        if not msg.data and headers.get("Status") == _NO_RESPONDERS:
            self._replies.no_responder(token)
        else:
            self._replies.resolve(token, RawReply(msg.data, headers))

    def _denied(self, kind: str, subject: str) -> None:
        if kind == "subscription":
            self._denied_subjects.add(subject)
        else:
            self._replies.fail_where(
                lambda asked: asked.lower() == subject,
                lambda: BusError(f"the permissions forbid to publish to {subject}"),
            )

    @override
    async def _hang_up(self, deadline_s: float) -> None:
        remaining_s = deadline_s - asyncio.get_running_loop().time()
        if self.is_connected and remaining_s > 0:
            try:
                await self.flush(timeout_s=remaining_s)
            except (BusTimeout, BusDisconnected) as error:
                logger.warning("closing without knowing that all was sent: %s", error)
        await self._connection.close()
