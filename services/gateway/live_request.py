"""One live request: the truth about it, free of I/O.

Tokens arrive from any instance, late, twice or out of order; what leaves here is each output token
exactly once, in order, and one terminal state.
"""

from dataclasses import dataclass, replace

from shared.core.lifecycle import Lifecycle, RequestEvent, RequestState
from shared.core.request import FinishReason, Request, RequestKey, TokenLogprobs
from shared.messages.tokens import TokenDelta


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What one delta brought: new tokens in order, and whether some before them are missing."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str = ""
    has_gap: bool = False
    is_stale: bool = False


class LiveRequest:
    """Prompt, parameters, attempt and emitted tokens of a request that is not over yet."""

    def __init__(self, request: Request, *, accepted_s: float) -> None:
        self._original = request
        self.accepted_s = accepted_s
        self.last_heard_s = accepted_s
        self.attempt = request.attempt
        self.output_token_ids: list[int] = list(request.output_token_ids)
        self.instances: tuple[str, ...] = ()
        self.num_cached_tokens = 0
        self.num_failures = 0
        self.fruitless_since_s = accepted_s
        self.num_fruitless = 0
        """Attempts lost in a row without a new token."""
        self.num_unknown = 0
        """How often in a row no instance knew the attempt although the leader had placed it."""
        self.lifecycle = Lifecycle()
        self._early: dict[int, TokenDelta] = {}

    @property
    def request_id(self) -> str:
        """The request's name, the same over all attempts."""
        return self._original.request_id

    @property
    def key(self) -> RequestKey:
        """Identity of the current attempt."""
        return RequestKey(self.request_id, self.attempt)

    @property
    def state(self) -> RequestState:
        """Where the request is in its life."""
        return self.lifecycle.state

    @property
    def is_terminal(self) -> bool:
        """Whether its one terminal state is written."""
        return self.lifecycle.is_terminal

    @property
    def has_gap(self) -> bool:
        """Whether tokens wait for some that should have come before them."""
        return bool(self._early)

    def request(self) -> Request:
        """The current attempt: the original prompt and all that was emitted so far."""
        return replace(
            self._original, attempt=self.attempt, output_token_ids=tuple(self.output_token_ids)
        )

    def on_accepted(self, now_s: float) -> None:
        """A leader has taken the current attempt."""
        self.last_heard_s = now_s
        if self.state is RequestState.RECEIVED:
            self.lifecycle.apply(RequestEvent.SUBMIT)

    def on_placed(self, attempt: int, instances: tuple[str, ...], now_s: float) -> None:
        """The leader gave ``attempt`` to ``instances``; older news are ignored."""
        if attempt != self.attempt or self.is_terminal or self.state is RequestState.CANCELLING:
            return
        self.on_accepted(now_s)
        self.instances = instances
        self.lifecycle.apply(RequestEvent.PLACE)

    def on_lost(self, attempt: int, now_s: float) -> bool:
        """``attempt`` is over without an end; returns whether a next one must be submitted."""
        if attempt != self.attempt or self.is_terminal or self.state is RequestState.CANCELLING:
            return False
        if self.state is not RequestState.RECEIVED:
            self.lifecycle.apply(RequestEvent.LOSE)
        self.attempt += 1
        if not self.num_fruitless:
            self.fruitless_since_s = now_s
        self.num_fruitless += 1
        self.num_unknown = 0
        self.instances = ()
        self._early.clear()
        return True

    def on_delta(self, delta: TokenDelta, now_s: float) -> Progress:
        """Take what a worker says it generated.

        Deltas of another attempt, or after the end, are stale. Tokens that were emitted already
        are skipped; tokens behind a gap wait until it is filled.
        """
        if (
            delta.attempt != self.attempt
            or self.is_terminal
            or self.state is RequestState.CANCELLING
        ):
            return Progress(is_stale=True)
        self.last_heard_s = now_s
        self.num_unknown = 0
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.error:
            return Progress(error=delta.error)
        if self.state is RequestState.RECEIVED:
            self.lifecycle.apply(RequestEvent.SUBMIT)
        if delta.offset > len(self.output_token_ids):
            self._keep_early(delta)
            return Progress(has_gap=True)
        progress = self._take(delta)
        if progress.token_ids:
            self.num_fruitless = 0
        return progress

    def _keep_early(self, delta: TokenDelta) -> None:
        known = self._early.get(delta.offset)
        if known is None or len(known.token_ids) < len(delta.token_ids):
            self._early[delta.offset] = delta

    def _take(self, delta: TokenDelta) -> Progress:
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        finish_reason: FinishReason | None = None
        following: TokenDelta | None = delta
        while following is not None:
            num_known = len(self.output_token_ids)
            fresh = following.token_ids[num_known - following.offset :]
            tokens += fresh
            self.output_token_ids += fresh
            if following.logprobs is not None:
                logprobs += following.logprobs[num_known - following.offset :]
            finish_reason = finish_reason or following.finish_reason
            following = self._next_early()
        if tokens:
            self.lifecycle.apply(RequestEvent.TOKEN)
        if finish_reason is not None:
            self.lifecycle.apply(RequestEvent.FINISH)
        return Progress(
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs) or None,
            finish_reason=finish_reason,
            has_gap=self.has_gap and finish_reason is None,
        )

    def _next_early(self) -> TokenDelta | None:
        reachable = [o for o in self._early if o <= len(self.output_token_ids)]
        return self._early.pop(min(reachable)) if reachable else None
