"""The seam between the HTTP edge and what generates: the edge knows tokens in and tokens out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from shared.core.request import FinishReason, SamplingParams, Slo, TokenLogprobs
from shared.errors import Refused


class Unserved(Refused):
    """Nobody serves the model at the moment: refused like any other, but HTTP 503, not 429."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One choice to generate, validated and tokenised.

    ``request_id`` is the gateway's own and never reused; ``client_request_id`` is the caller's
    ``x-request-id`` if there was one, and may repeat. ``index`` is the choice's place in the
    response. ``group_id`` joins the choices of one prompt (``n > 1``) and is ``None`` for a lone
    one. ``arrived_at_s`` is when the HTTP request came in, on the application's clock. ``api``
    (``chat`` or ``completion``), ``is_stream`` and ``key_id`` say how it came, for the log.
    ``len(prompt_token_ids) + sampling.max_tokens`` fits the model's context.
    """

    request_id: str
    index: int
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    slo: Slo = field(default_factory=Slo)
    priority: int = 0
    tenant: str = ""
    group_id: str | None = None
    client_request_id: str | None = None
    arrived_at_s: float = 0.0
    api: str = ""
    is_stream: bool = False
    key_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """The next tokens of one request, in order, without gaps or repeats.

    ``logprobs`` has one entry a token if the request asked for them, else ``None``.
    ``finish_reason`` is set in the last event, which also carries the last token; with
    ``FinishReason.STOP`` that last token is the stop token itself and no part of the answer.
    ``num_cached_tokens`` counts prompt tokens whose KV was reused; it may be known in any event.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int | None = None


class GenerationStream(Protocol):
    """The events of one accepted request; exactly one consumer.

    Iterating ends after the event with a ``finish_reason`` and raises ``RequestFailed`` when the
    request ends without its answer.
    """

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """The stream itself."""
        ...

    async def __anext__(self) -> TokenEvent:
        """The next event."""
        ...

    async def aclose(self, finish_reason: FinishReason | None = None) -> None:
        """Say that no further token is wanted, which cancels the request wherever it runs.

        With a ``finish_reason`` the answer is complete (a stop string was found): the request
        counts as finished. Without one it was abandoned and counts as cancelled. Does nothing
        after the last event or a second time; returns without waiting for any worker.
        """
        ...


class Generator(Protocol):
    """Takes requests and hands back their token streams."""

    async def submit(self, request: GenerationRequest) -> GenerationStream:
        """Have ``request`` accepted; the caller owns the stream and must close it.

        Raises ``Refused`` (``Unserved`` if nobody serves the model), ``InvalidRequest`` or
        ``RequestFailed``. A submission that is cancelled while it waits leaves nothing behind.
        """
        ...
