"""The consumer's end of one live request."""

import asyncio
from collections import deque
from collections.abc import Callable

from services.gateway.generation import TokenEvent
from shared.core.request import FinishReason


class TokenStream:
    """Events of one accepted request, one consumer; implements ``GenerationStream``.

    ``on_close(finish_reason)`` is called when the consumer leaves before the last event.
    """

    def __init__(self, on_close: Callable[[FinishReason | None], None]) -> None:
        self._on_close = on_close
        self._events: deque[TokenEvent] = deque()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None
        self._is_over = False
        self._is_closed = False

    def push(self, event: TokenEvent) -> None:
        """Hand the consumer the next tokens; the one with a ``finish_reason`` is the last."""
        self._events.append(event)
        self._is_over = event.finish_reason is not None
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """End the stream with ``error``, behind the events that came before it."""
        self._error = error
        self._is_over = True
        self._arrived.set()

    def __aiter__(self) -> "TokenStream":
        """The stream itself."""
        return self

    async def __anext__(self) -> TokenEvent:
        """The next event; raises ``RequestFailed`` when the request ended without its answer."""
        while not self._events:
            if self._is_closed:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()

    async def aclose(self, finish_reason: FinishReason | None = None) -> None:
        """No further token is wanted; does nothing after the end or a second time."""
        if self._is_closed:
            return
        self._is_closed = True
        self._events.clear()
        self._arrived.set()
        if not self._is_over:
            self._on_close(finish_reason)
