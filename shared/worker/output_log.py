"""What a worker has generated, kept until its gateway has it. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.core.request import FinishReason, RequestKey, TokenLogprobs
from shared.messages.tokens import StreamState, TokenDelta


@dataclass(slots=True)
class Output:
    """All output tokens of one attempt that this worker knows, from position ``offset`` on."""

    gateway: str
    offset: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    num_cached_tokens: int = 0
    ended_s: float | None = None


class OutputLog:
    """Outputs by attempt. An ended one stays until it is acknowledged or ``ttl_s`` old."""

    def __init__(self, *, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._outputs: dict[RequestKey, Output] = {}

    def __len__(self) -> int:
        return len(self._outputs)

    def open(self, key: RequestKey, *, gateway: str, offset: int) -> None:
        """An attempt begins here; its first new token will be number ``offset``."""
        self._outputs.setdefault(key, Output(gateway=gateway, offset=offset))

    def append(self, delta: TokenDelta, now_s: float) -> None:
        """Record new tokens, or the end. Tokens that are known already are skipped."""
        output = self._outputs.get(RequestKey(delta.request_id, delta.attempt))
        if output is None:
            return
        skip = output.offset + len(output.token_ids) - delta.offset
        output.token_ids += delta.token_ids[max(0, skip) :]
        if delta.logprobs is not None:
            output.logprobs += delta.logprobs[max(0, skip) :]
        output.num_cached_tokens = max(output.num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason is not None or delta.error:
            output.finish_reason = delta.finish_reason
            output.error = delta.error
            output.ended_s = now_s

    def close(self, key: RequestKey, now_s: float) -> None:
        """Nothing more will come here (the attempt was handed over); keep what there is a while."""
        output = self._outputs.get(key)
        if output is not None and output.ended_s is None:
            output.ended_s = now_s

    def discard(self, keys: Iterable[RequestKey]) -> None:
        """Forget these attempts."""
        for key in keys:
            self._outputs.pop(key, None)

    def expire(self, now_s: float) -> None:
        """Forget what has been over for ``ttl_s``."""
        old = [
            key
            for key, output in self._outputs.items()
            if output.ended_s is not None and now_s - output.ended_s > self._ttl_s
        ]
        self.discard(old)

    def ended(self) -> list[tuple[RequestKey, str]]:
        """``(attempt, gateway)`` of all that came to their end here and are still kept."""
        return [(k, o.gateway) for k, o in self._outputs.items() if o.finish_reason or o.error]

    def since(self, key: RequestKey, offset: int) -> tuple[StreamState, TokenDelta | None]:
        """All that is known from ``offset`` on, and whether more will come from here."""
        output = self._outputs.get(key)
        if output is None or offset < output.offset:
            return StreamState.UNKNOWN, None
        state = StreamState.RUNNING if output.ended_s is None else StreamState.ENDED
        known = offset - output.offset
        if known > len(output.token_ids):
            return state, None
        tokens = tuple(output.token_ids[known:])
        is_end = bool(output.finish_reason or output.error)
        if not tokens and not is_end:
            return state, None
        delta = TokenDelta(
            request_id=key.request_id,
            attempt=key.attempt,
            offset=offset,
            token_ids=tokens,
            logprobs=tuple(output.logprobs[known:]) if output.logprobs else None,
            finish_reason=output.finish_reason,
            error=output.error,
            num_cached_tokens=output.num_cached_tokens,
        )
        return state, delta
