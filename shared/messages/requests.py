"""Between gateways and the leading scheduler: taking, placing, losing and closing requests."""

from enum import StrEnum

from shared.core.request import Request, RequestKey
from shared.messages.base import Message


class SubmitStatus(StrEnum):
    """What the leader says of a submitted attempt."""

    QUEUED = "queued"
    PLACED = "placed"
    LOST = "lost"
    REFUSED = "refused"


class SubmitRequest(Message, frozen=True, kw_only=True):
    """Take this attempt, or say what has become of it.

    Publisher: the gateway that owns the request. Subscriber: the leading scheduler on
    ``requests.<model>``. Delivery: request/reply; re-sent unchanged when no answer comes, when a
    new leader announces itself and when the request has been silent. Idempotency key:
    ``request.key``; a known attempt is answered, not started again. ``age_s``: seconds since the
    gateway accepted it. ``is_resend``: an earlier leader may have placed this attempt already.
    """

    model: str
    gateway: str
    request: Request
    age_s: float = 0.0
    is_resend: bool = False


class SubmitReply(Message, frozen=True, kw_only=True):
    """The leader's answer to ``SubmitRequest``.

    Publisher: the leading scheduler. Subscriber: the asking gateway. Delivery: reply. Idempotency
    key: ``(request_id, attempt)``. ``LOST`` means that this attempt is over without an end and
    the gateway may start the next one; ``REFUSED`` carries a reason and when to come back.
    ``instances`` are those that can be asked for its tokens, the likeliest first.
    """

    request_id: str
    attempt: int
    leader_epoch: int
    status: SubmitStatus
    reason: str = ""
    retry_after_s: float = 0.0
    instances: tuple[str, ...] = ()


class CloseRequest(Message, frozen=True, kw_only=True):
    """This request has reached its terminal state; free whatever is left of it.

    Publisher: its gateway, once the state is written. Subscriber: the leading scheduler on
    ``requests.<model>``. Delivery: request/reply with ``Done``, retried until answered.
    Idempotency key: ``request_id`` (all attempts are meant).
    """

    model: str
    request_id: str
    attempt: int
    outcome: str


class Done(Message, frozen=True, kw_only=True):
    """It was done (or had been done before).

    Publisher: whoever served the command. Subscriber: who sent it. Delivery: reply.
    Idempotency: none needed. ``count`` says how many things it touched, where that is a question.
    """

    count: int = 0


class AttemptPlaced(Message, frozen=True, kw_only=True):
    """An attempt was given to instances.

    Publisher: the leading scheduler. Subscriber: the gateway, on ``events.gateway.<gateway>``.
    Delivery: core, a hint; the same is learned from the tokens and from ``SubmitReply``.
    Idempotency key: ``(request_id, attempt)``.
    """

    request_id: str
    attempt: int
    leader_epoch: int
    instances: tuple[str, ...]


class AttemptLost(Message, frozen=True, kw_only=True):
    """An attempt died with its instance; the gateway starts the next one.

    Publisher: the leading scheduler. Subscriber: the gateway, on ``events.gateway.<gateway>``.
    Delivery: core, a hint; a gateway that misses it learns the same from ``SubmitReply``.
    Idempotency key: ``(request_id, attempt)``.
    """

    request_id: str
    attempt: int
    leader_epoch: int
    reason: str


class LeaderChanged(Message, frozen=True, kw_only=True):
    """A scheduler took the leader lease.

    Publisher: the new leader. Subscribers: gateways (which re-send what is live) and workers
    (which refuse older epochs from now on), on ``events.leader``. Delivery: core; repeated in
    every ``SubmitReply`` and command. Idempotency key: ``leader_epoch``.
    """

    scheduler: str
    model: str
    leader_epoch: int


class SnapshotRequest(Message, frozen=True, kw_only=True):
    """Say what you hold.

    Publisher: the leading scheduler, on taking the lease and at its audits. Subscribers: one
    worker or gateway, on ``snapshot.<instance>``. Delivery: request/reply. Idempotent.
    """

    leader_epoch: int


class GatewaySnapshot(Message, frozen=True, kw_only=True):
    """The live requests of one gateway.

    Publisher: that gateway. Subscriber: the asking leader. Delivery: reply. Idempotent.
    """

    gateway: str
    requests: tuple[RequestKey, ...]
