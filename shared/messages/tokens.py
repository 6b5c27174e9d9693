"""From workers to gateways: what was generated, and what was missed."""

from enum import StrEnum

import msgspec

from shared.core.request import FinishReason, RequestKey, TokenLogprobs
from shared.messages.base import Message


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one attempt: ``token_ids[0]`` is output token number ``offset`` (from 0).

    ``logprobs`` has an entry a token when the request asked for them. ``finish_reason`` comes with
    the last token; ``error`` instead of it when the attempt failed at the worker.
    """

    request_id: str
    attempt: int
    offset: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str = ""
    num_cached_tokens: int = 0


class TokenBatch(Message, frozen=True, kw_only=True):
    """All that one engine step produced for the requests of one gateway.

    Publisher: a worker. Subscriber: that gateway, on ``tokens.to.<gateway>``. Delivery: core, at
    most once; a gap in the offsets is asked for by ``TokensSince``. Idempotency key:
    ``(request_id, attempt, offset)`` of each delta.
    """

    instance: str
    deltas: tuple[TokenDelta, ...]


class StreamState(StrEnum):
    """What a worker knows of an attempt's output."""

    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"


class TokensSince(Message, frozen=True, kw_only=True):
    """Repeat what this attempt generated from ``offset`` on.

    Publisher: the gateway, on a gap, after a reconnect and after a second of silence. Subscriber:
    a worker, on ``tokens.since.<instance>``. Delivery: request/reply. Idempotent.
    """

    request_id: str
    attempt: int
    offset: int


class TokensSinceReply(Message, frozen=True, kw_only=True):
    """What the worker still has. ``UNKNOWN``: never had it, or acknowledged, or too old.

    Publisher: the worker. Subscriber: the asking gateway. Delivery: reply. Idempotency key: as
    ``TokenBatch``.
    """

    instance: str
    state: StreamState
    delta: TokenDelta | None = None


class AckTokens(Message, frozen=True, kw_only=True):
    """These attempts' outputs arrived to their end and need not be kept.

    Publisher: the gateway. Subscriber: a worker, on ``tokens.ack.<instance>``. Delivery: core; an
    output whose acknowledgement is lost is dropped after 60 s. Idempotent.
    """

    gateway: str
    requests: tuple[RequestKey, ...]
