"""Between the leading scheduler and the prefill and decode workers."""

from enum import StrEnum

import msgspec

from shared.core.request import FinishReason, Request, RequestKey, TokenLogprobs
from shared.messages.base import Message


class KVTarget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a prefill sends the KV it computes: a reservation at another instance.

    ``address`` is that instance's data-plane address, ``transfer_id`` never reused there. Blocks
    below ``first_block`` are there already and need not be sent.
    """

    instance: str
    transfer_id: int
    address: bytes
    first_block: int = 0


class ReserveKV(Message, frozen=True, kw_only=True):
    """Reserve blocks for a request whose KV will arrive by transfer; go on decoding when it has.

    Publisher: the leading scheduler. Subscriber: one worker, on ``<role>.<instance>.reserve``.
    Delivery: request/reply with ``KVReserved``. Idempotency key: ``request.key``: asked twice, it
    answers with the same reservation. ``kv_layout`` names the layout both sides must share. The
    reservation ends by itself when the transfer has not finished within ``ttl_s``.
    """

    leader_epoch: int
    gateway: str
    request: Request
    kv_layout: str
    ttl_s: float


class KVReserved(Message, frozen=True, kw_only=True):
    """The blocks are reserved.

    Publisher: the worker. Subscriber: the leader. Delivery: reply. Idempotency key:
    ``(request_id, attempt)``.
    """

    request_id: str
    attempt: int
    target: KVTarget


class StartItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request of a batch. Without ``target`` it is served to its end where it starts."""

    gateway: str
    request: Request
    target: KVTarget | None = None


class StartBatch(Message, frozen=True, kw_only=True):
    """Prefill these requests together and hand each on to its target, or serve it to its end.

    Publisher: the leading scheduler. Subscriber: one worker, on ``<role>.<instance>.start``.
    Delivery: request/reply with ``Done``. Idempotency key: each ``request.key``: what is known is
    not started again.
    """

    leader_epoch: int
    batch_id: int
    items: tuple[StartItem, ...]


class AbortRequests(Message, frozen=True, kw_only=True):
    """Stop these attempts and free their blocks, whatever state they are in.

    Publisher: the leading scheduler. Subscriber: one worker, on ``<role>.<instance>.abort``.
    Delivery: request/reply with ``Done``; unknown attempts are ignored. Idempotent. A worker takes
    commands in the order of their arrival, so that an abort always finds what was sent before it.
    """

    leader_epoch: int
    requests: tuple[RequestKey, ...]
    reason: str


class RequestStage(StrEnum):
    """How far a worker is with an attempt."""

    RESERVED = "reserved"
    PREFILL = "prefill"
    SENDING = "sending"
    DECODE = "decode"
    ENDED = "ended"


class HeldRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt in a worker's snapshot. ``peer`` is the instance its KV goes to or comes from."""

    request_id: str
    attempt: int
    gateway: str
    stage: RequestStage
    num_tokens: int
    peer: str = ""


class WorkerSnapshot(Message, frozen=True, kw_only=True):
    """What a worker holds. Having answered, it refuses commands of older epochs.

    Publisher: the worker. Subscriber: the asking leader. Delivery: reply. Idempotent.
    """

    role: str
    instance: str
    requests: tuple[HeldRequest, ...]


class HandoffTrailer(Message, frozen=True, kw_only=True):
    """The last piece of a KV transfer: what the prefill has generated, so that decode goes on.

    Publisher: the prefilling worker. Subscriber: the receiving one. Delivery: not on the bus but
    as the payload of the transfer's trailer piece, behind all KV. Idempotency key:
    ``(request_id, attempt)``. ``output_token_ids`` are all output tokens so far; with a
    ``finish_reason`` there is nothing left to decode.
    """

    request_id: str
    attempt: int
    output_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0


class PrefillFinished(Message, frozen=True, kw_only=True):
    """The prompt's KV is computed and the first token was sent to the gateway.

    Publisher: the worker. Subscriber: the scheduler, on ``events.request.<request>``. Delivery:
    core, a hint: load reports and snapshots say the same later. Idempotency key:
    ``(request_id, attempt)``.
    """

    instance: str
    request_id: str
    attempt: int
    batch_id: int
    num_prompt_tokens: int
    num_cached_tokens: int


class TransferFinished(Message, frozen=True, kw_only=True):
    """The KV is in the decode instance, which goes on from here.

    Publisher: the receiving worker. Subscriber: the scheduler, on ``events.request.<request>``.
    Delivery: core, a hint. Idempotency key: ``(request_id, attempt)``.
    """

    instance: str
    request_id: str
    attempt: int


class AttemptEnded(Message, frozen=True, kw_only=True):
    """A worker is through with an attempt: at its end (``error`` empty) or because it failed.

    Publisher: the worker. Subscriber: the scheduler, on ``events.request.<request>``. Delivery:
    core, a hint; the verdict over the request is its gateway's. Idempotency key:
    ``(request_id, attempt)``.
    """

    instance: str
    request_id: str
    attempt: int
    num_output_tokens: int
    error: str = ""
