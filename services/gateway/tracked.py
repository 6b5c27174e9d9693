"""A live request together with its consumer and the work under way for it."""

import asyncio

from services.gateway.ended_request import EndedRequest
from services.gateway.generation import GenerationRequest
from services.gateway.live_request import LiveRequest
from services.gateway.token_stream import TokenStream
from shared.core.request import FinishReason


class Tracked:
    """What the tracker keeps of a request; the times are on its clock."""

    def __init__(self, live: LiveRequest, request: GenerationRequest) -> None:
        self.live = live
        self.request = request
        self.model = request.model
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.stream: TokenStream
        self.submission: asyncio.Task[None] | None = None
        self.inquiry: asyncio.Task[None] | None = None

    def ended(
        self, now_s: float, finish_reason: FinishReason | None, error: Exception | None
    ) -> EndedRequest:
        """The record of the request, whose terminal state is written."""
        return EndedRequest(
            request=self.request,
            state=self.live.state,
            num_attempts=self.live.attempt + 1,
            num_cached_tokens=self.live.num_cached_tokens,
            num_output_tokens=len(self.live.output_token_ids),
            finish_reason=finish_reason,
            error=error,
            accepted_s=self.live.accepted_s,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            ended_s=now_s,
        )
