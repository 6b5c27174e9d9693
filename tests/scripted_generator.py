"""A ``Generator`` that plays scripts: the twin of the tracker in tests of the HTTP edge."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from services.gateway.generation import GenerationRequest, TokenEvent
from shared.core.request import FinishReason, TokenLogprobs

Step = TokenEvent | Exception | asyncio.Event
"""Give an event, raise an error, or wait until something is set."""


class ScriptedStream:
    """The steps of one request."""

    def __init__(self, steps: Sequence[Step], on_close: Callable[[FinishReason | None], None]):
        self._steps = list(steps)
        self._on_close = on_close
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        while self._steps and not self._is_over:
            step = self._steps.pop(0)
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Exception):
                self._is_over = True
                raise step
            else:
                self._is_over = step.finish_reason is not None
                return step
        raise StopAsyncIteration

    async def aclose(self, finish_reason: FinishReason | None = None) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_close(finish_reason)


class ScriptedGenerator:
    """Plays ``script(request)`` for each request and keeps a record of all it was told."""

    def __init__(self, script: Callable[[GenerationRequest], Sequence[Step]]) -> None:
        self.script = script
        self.refuse: Callable[[GenerationRequest], Exception | None] = lambda _: None
        self.requests: list[GenerationRequest] = []
        self.closed: dict[str, FinishReason | None] = {}
        self.changed = asyncio.Event()

    async def submit(self, request: GenerationRequest) -> ScriptedStream:
        refusal = self.refuse(request)
        if refusal is not None:
            raise refusal
        self.requests.append(request)
        self._notify()

        def on_close(finish_reason: FinishReason | None) -> None:
            self.closed[request.request_id] = finish_reason
            self._notify()

        return ScriptedStream(self.script(request), on_close)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once ``condition`` holds; it is looked at whenever something happened here."""
        while not condition():
            await self.changed.wait()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


def tokens(
    token_ids: Sequence[int],
    *,
    num_top: int | None = None,
    finish_reason: FinishReason = FinishReason.STOP,
    stop_token_id: int = 2,
    num_cached_tokens: int | None = None,
) -> list[TokenEvent]:
    """One event a token, and the end: with a stop token of its own, or with the last token.

    With ``num_top`` the logprobs of position ``i`` are ``-i`` and, for the tokens beside it,
    ``-i - 1`` and so on; the chosen token is the most likely one.
    """
    ids = [*token_ids, stop_token_id] if finish_reason is FinishReason.STOP else list(token_ids)
    return [
        TokenEvent(
            token_ids=(token_id,),
            logprobs=None if num_top is None else (_logprobs(position, token_id, num_top),),
            finish_reason=finish_reason if position == len(ids) - 1 else None,
            num_cached_tokens=num_cached_tokens if position == 0 else None,
        )
        for position, token_id in enumerate(ids)
    ]


def _logprobs(position: int, token_id: int, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=-float(position),
        top_ids=tuple(token_id + offset for offset in range(num_top)),
        top_logprobs=tuple(-float(position) - offset for offset in range(num_top)),
    )
